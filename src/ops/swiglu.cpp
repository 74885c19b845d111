// check -> run, on the CPU or on CUDA. One kernel per dtype: there is nothing to plan.
#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "jit/kernels.h"
#include "ops/check_quantize.h"
#include "ops/kernel.h"
#include "ops/scaled_matrix.h"
#include "phalanx/activation.h"

namespace phalanx {
namespace {

using std::int64_t;

// Where gate and up begin, and how they go on, must suit pieces of 16 bytes.
bool gate_up_has_vectors(const Tensor& x, const Tensor& other) { return has_vectors(x, &other, x.cols() / 2); }

float* floats_of(const Tensor& x) { return static_cast<float*>(x.data); }
const float* weights_of(const SwigluOptions& options) {
  return options.weights ? floats_of(*options.weights) : nullptr;
}
int64_t weight_stride_of(const SwigluOptions& options) { return options.weights ? options.weights->strides[0] : 0; }

void quantize_on_cuda(const Tensor& x, const ScaledTensor& q, const SwigluOptions& options) {
  const int ordinal = x.device.index;
  cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  const SwigluConfig config{float_type(x.dtype)};
  static KernelOfDevice kernels[kNumFloatTypes];
  const cuda::Kernel& kernel =
      kernels[int(config.type)].get(ordinal, [&] { return jit::swiglu_quantize_source(config); });
  const int64_t rows = x.rows(), cols = x.cols() / 2;
  const SwigluParams params{.x = x.data,
                            .x_stride = row_stride(x),
                            .q = scaled_matrix(q),
                            .q_t = {},
                            .weights = weights_of(options),
                            .weight_stride = weight_stride_of(options),
                            .rows = int(rows),
                            .cols = int(cols),
                            .rows_per_warp = RowTiles::rows_per_warp(config.type, rows, cols),
                            .limit = options.limit,
                            .interleaved = options.interleaved,
                            .vectors = gate_up_has_vectors(x, q.data),
                            .pow2_scales = options.pow2_scales};
  const int num_ctas = int(RowTiles::num_ctas(config.type, rows, cols));
  kernel.launch({.num_ctas = num_ctas, .num_threads = config.num_threads()}, &params, options.stream.handle);
}

void backward_on_cuda(const Tensor& x, const Tensor& grad, const Tensor& grad_x, const Tensor* grad_weights,
                      const SwigluOptions& options) {
  const int ordinal = x.device.index;
  cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  const SwigluBackwardConfig config{float_type(x.dtype)};
  static KernelOfDevice kernels[kNumFloatTypes];
  const cuda::Kernel& kernel =
      kernels[int(config.type)].get(ordinal, [&] { return jit::swiglu_backward_source(config); });
  const int rows_per_cta = WholeRows::rows_per_cta(x.rows());
  const SwigluBackwardParams params{
      .x = x.data,
      .x_stride = row_stride(x),
      .grad = grad.data,
      .grad_stride = row_stride(grad),
      .grad_x = grad_x.data,
      .grad_x_stride = row_stride(grad_x),
      .weights = weights_of(options),
      .weight_stride = weight_stride_of(options),
      .grad_weights = grad_weights ? floats_of(*grad_weights) : nullptr,
      .grad_weight_stride = grad_weights ? grad_weights->strides[0] : 0,
      .rows = int(x.rows()),
      .cols = int(x.cols() / 2),
      .rows_per_cta = rows_per_cta,
      .limit = options.limit,
      .interleaved = options.interleaved,
      .vectors = gate_up_has_vectors(x, grad) && rows_are_aligned(grad, 16) && rows_are_aligned(grad_x, 16)};
  const int num_ctas = int(ceil_div<int64_t>(x.rows(), rows_per_cta));
  kernel.launch({.num_ctas = num_ctas, .num_threads = config.num_threads()}, &params, options.stream.handle);
}

void quantize_both_on_cuda(const Tensor& x, const ScaledTensor& q, const ScaledTensor& q_t,
                           const SwigluOptions& options) {
  const int ordinal = x.device.index;
  cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  constexpr SwigluTilesConfig kConfig{FloatType::bf16};
  static KernelOfDevice kernels;
  const cuda::Kernel& kernel = kernels.get(ordinal, jit::swiglu_quantize_both_source);
  const int64_t rows = x.rows(), cols = x.cols() / 2;
  const SwigluParams params{.x = x.data,
                            .x_stride = row_stride(x),
                            .q = scaled_matrix(q),
                            .q_t = scaled_matrix(q_t),
                            .weights = weights_of(options),
                            .weight_stride = weight_stride_of(options),
                            .rows = int(rows),
                            .cols = int(cols),
                            .rows_per_warp = 0,
                            .limit = options.limit,
                            .interleaved = options.interleaved,
                            .vectors = gate_up_has_vectors(x, q.data),
                            .pow2_scales = options.pow2_scales};
  const int num_ctas = int(SquareTiles::num_ctas(rows, cols));
  kernel.launch({.num_ctas = num_ctas, .num_threads = kConfig.num_threads()}, &params, options.stream.handle);
}

// A block of columns must not have gates and ups both, unless they take turns; and there must be work for all SMs.
bool backward_in_pairs(const Tensor& x, bool vectors, const SwigluOptions& options) {
  constexpr int64_t kEnoughCtas = 264;  // two an SM
  const int64_t cols = x.cols() / 2;
  return vectors && (options.interleaved || cols % kQuantizeBlock == 0) &&
         SquareTiles::num_ctas(x.rows(), cols) >= kEnoughCtas;
}

void backward_both_on_cuda(const Tensor& x, const Tensor& grad, const ScaledTensor& q, const ScaledTensor& q_t,
                           const SwigluOptions& options) {
  const int ordinal = x.device.index;
  cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  const bool vectors = gate_up_has_vectors(x, q.data) && rows_are_aligned(grad, 16);
  const SwigluTilesConfig config{FloatType::bf16, backward_in_pairs(x, vectors, options)};
  static KernelOfDevice kernels[2];
  const cuda::Kernel& kernel = kernels[config.pairs].get(
      ordinal, [&] { return jit::swiglu_backward_both_source(config.pairs); }, config.smem_bytes());
  const SwigluBackwardBothParams params{.x = x.data,
                                        .x_stride = row_stride(x),
                                        .grad = grad.data,
                                        .grad_stride = row_stride(grad),
                                        .q = scaled_matrix(q),
                                        .q_t = scaled_matrix(q_t),
                                        .weights = weights_of(options),
                                        .weight_stride = weight_stride_of(options),
                                        .rows = int(x.rows()),
                                        .cols = int(x.cols() / 2),
                                        .limit = options.limit,
                                        .interleaved = options.interleaved,
                                        .vectors = vectors,
                                        .pow2_scales = options.pow2_scales};
  const int num_ctas = int(config.num_backward_ctas(x.rows(), x.cols() / 2));
  kernel.launch({.num_ctas = num_ctas, .num_threads = config.num_threads(), .smem_bytes = config.smem_bytes()}, &params,
                options.stream.handle);
}

}  // namespace

void swiglu_quantize(const Tensor& x, const ScaledTensor& q, const SwigluOptions& options) {
  check_swiglu_quantize(x, q, options);
  if (x.rows() == 0 || x.cols() == 0) return;
  if (x.device.type == DeviceType::cuda)
    quantize_on_cuda(x, q, options);
  else
    cpu::swiglu_quantize(x, q, options);
}

void swiglu_backward(const Tensor& x, const Tensor& grad, const Tensor& grad_x,
                     const std::optional<Tensor>& grad_weights, const SwigluOptions& options) {
  const Tensor* wanted = grad_weights ? &*grad_weights : nullptr;
  check_swiglu_backward(x, grad, grad_x, wanted, options);
  if (x.rows() == 0) return;
  if (x.device.type == DeviceType::cuda)
    backward_on_cuda(x, grad, grad_x, wanted, options);
  else
    cpu::swiglu_backward(x, grad, grad_x, wanted, options);
}

void swiglu_quantize_both(const Tensor& x, const ScaledTensor& q, const ScaledTensor& q_t,
                          const SwigluOptions& options) {
  check_swiglu_quantize_both(x, q, q_t, options);
  if (x.rows() == 0 || x.cols() == 0) return;
  if (x.device.type == DeviceType::cuda)
    quantize_both_on_cuda(x, q, q_t, options);
  else
    cpu::swiglu_quantize_both(x, q, q_t, options);
}

void swiglu_backward_both(const Tensor& x, const Tensor& grad, const ScaledTensor& q, const ScaledTensor& q_t,
                          const SwigluOptions& options) {
  check_swiglu_backward_both(x, grad, q, q_t, options);
  if (x.rows() == 0 || x.cols() == 0) return;
  if (x.device.type == DeviceType::cuda)
    backward_both_on_cuda(x, grad, q, q_t, options);
  else
    cpu::swiglu_backward_both(x, grad, q, q_t, options);
}

}  // namespace phalanx
