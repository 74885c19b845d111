// check -> run, on the CPU or on CUDA. One kernel per dtype and form: there is nothing to plan.
#include "phalanx/quantize.h"

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "jit/kernels.h"
#include "ops/check_quantize.h"
#include "ops/kernel.h"
#include "ops/scaled_matrix.h"

namespace phalanx {
namespace {

constexpr int kNumForms = 4, kNumScaleShapes = 2;

void quantize_on_cuda(QuantizeForm form, const Tensor& x, const ScaledTensor* q, const ScaledTensor* q_t,
                      const QuantizeOptions& options) {
  const int ordinal = x.device.index;
  cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  const QuantizeConfig config{float_type(x.dtype), form};
  static KernelOfDevice kernels[kNumForms][kNumFloatTypes];
  const cuda::Kernel& kernel =
      kernels[int(form)][int(config.type)].get(ordinal, [&] { return jit::quantize_source(config); });
  const QuantizeParams params{.x = x.data,
                              .x_stride = row_stride(x),
                              .q = q ? scaled_matrix(*q) : ScaledMatrix{},
                              .q_t = q_t ? scaled_matrix(*q_t) : ScaledMatrix{},
                              .rows = int(x.rows()),
                              .cols = int(x.cols()),
                              .rows_per_warp = RowTiles::rows_per_warp(config.type, x.rows(), x.cols()),
                              .vectors = has_vectors(x, q ? &q->data : nullptr, x.cols()),
                              .pow2_scales = options.pow2_scales};
  const int num_ctas = int(config.num_ctas(x.rows(), x.cols()));
  kernel.launch({.num_ctas = num_ctas, .num_threads = config.num_threads()}, &params, options.stream.handle);
}

void dequantize_on_cuda(ScaleShape shape, const ScaledTensor& q, const Tensor& x, Stream stream) {
  const int ordinal = x.device.index;
  cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  const DequantizeConfig config{float_type(x.dtype), shape};
  static KernelOfDevice kernels[kNumScaleShapes][kNumFloatTypes];
  const cuda::Kernel& kernel =
      kernels[int(shape)][int(config.type)].get(ordinal, [&] { return jit::dequantize_source(config); });
  const DequantizeParams params{.q = scaled_matrix(q),
                                .x = x.data,
                                .x_stride = row_stride(x),
                                .rows = int(x.rows()),
                                .cols = int(x.cols()),
                                .rows_per_warp = RowTiles::rows_per_warp(config.type, x.rows(), x.cols()),
                                .vectors = has_vectors(x, &q.data, x.cols())};
  const int num_ctas = int(RowTiles::num_ctas(config.type, x.rows(), x.cols()));
  kernel.launch({.num_ctas = num_ctas, .num_threads = config.num_threads()}, &params, stream.handle);
}

bool is_empty(const Tensor& x) { return x.rows() == 0 || x.cols() == 0; }

void quantize_on_cpu(QuantizeForm form, const Tensor& x, const ScaledTensor* q, const ScaledTensor* q_t,
                     bool pow2_scales) {
  const ScaleShape shape = form == QuantizeForm::blocks ? ScaleShape::block_128x128 : ScaleShape::row_1x128;
  if (q) cpu::quantize(x, *q, shape, pow2_scales);
  if (q_t) cpu::quantize_transposed(x, *q_t, pow2_scales);
}

void quantize(QuantizeForm form, const Tensor& x, const ScaledTensor* q, const ScaledTensor* q_t,
              const QuantizeOptions& options) {
  check_quantize(form, x, q, q_t);
  if (is_empty(x)) return;
  if (x.device.type == DeviceType::cuda)
    quantize_on_cuda(form, x, q, q_t, options);
  else
    quantize_on_cpu(form, x, q, q_t, options.pow2_scales);
}

}  // namespace

void quantize_rows(const Tensor& x, const ScaledTensor& q, const QuantizeOptions& options) {
  quantize(QuantizeForm::rows, x, &q, nullptr, options);
}

void quantize_blocks(const Tensor& x, const ScaledTensor& q, const QuantizeOptions& options) {
  quantize(QuantizeForm::blocks, x, &q, nullptr, options);
}

void quantize_transposed(const Tensor& x, const ScaledTensor& q, const QuantizeOptions& options) {
  quantize(QuantizeForm::transposed, x, nullptr, &q, options);
}

void quantize_both(const Tensor& x, const ScaledTensor& q, const ScaledTensor& q_t, const QuantizeOptions& options) {
  quantize(QuantizeForm::both, x, &q, &q_t, options);
}

void dequantize(const ScaledTensor& q, const Tensor& x, Stream stream) {
  const ScaleShape shape = check_dequantize(q, x);
  if (is_empty(x)) return;
  if (x.device.type == DeviceType::cuda)
    dequantize_on_cuda(shape, q, x, stream);
  else
    cpu::dequantize(q, x, shape);
}

}  // namespace phalanx
