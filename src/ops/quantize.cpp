// check -> run, on the CPU or on CUDA. One kernel per dtype and scale shape: there is nothing to plan.
#include "phalanx/quantize.h"

#include <algorithm>
#include <atomic>

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "device/quantize/config.h"
#include "device/quantize/params.h"
#include "jit/kernels.h"
#include "ops/check.h"
#include "ops/kernel.h"

namespace phalanx {
namespace {

FloatType float_type(DType dtype) {
  return dtype == DType::bf16 ? FloatType::bf16 : dtype == DType::f16 ? FloatType::f16 : FloatType::f32;
}

enum class Direction { quantize, dequantize };

void run_on_cuda(Direction direction, const Tensor& x, const ScaledTensor& q, ScaleShape shape, bool pow2_scales,
                 Stream stream) {
  const int ordinal = x.device.index;
  const cuda::DeviceInfo& device = require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  const QuantizeConfig config{float_type(x.dtype), shape};
  // Found by small indices, so that a warm call builds no strings. Two threads may both fill an entry, with the same pointer.
  static std::atomic<const cuda::Kernel*> kernels[cuda::kMaxDevices][2][3][2];
  auto& slot = kernels[ordinal][int(direction)][int(config.type)][int(config.shape)];
  const cuda::Kernel* kernel = slot;
  if (!kernel) {
    const bool to_e4m3 = direction == Direction::quantize;
    kernel = &load_kernel(ordinal, to_e4m3 ? jit::quantize_source(config) : jit::dequantize_source(config), 0);
    slot = kernel;
  }

  const QuantizeParams p{.x = x.data,
                         .q = static_cast<u8*>(q.data.data),
                         .scales = static_cast<float*>(q.scales.data),
                         .x_stride = row_stride(x),
                         .q_stride = row_stride(q.data),
                         .scale_stride_row = q.scales.strides[0],
                         .scale_stride_col = q.scales.strides[1],
                         .rows = int(x.rows()),
                         .cols = int(x.cols()),
                         .pow2_scales = pow2_scales};
  // Enough CTAs to fill every SM; they stride over the rest. A CTA's piece: 256 vectors of 16 bytes, or a 128 x 128 block.
  const bool by_block = direction == Direction::quantize && shape == ScaleShape::block_128x128;
  const std::int64_t piece = by_block ? kQuantizeBlock * kQuantizeBlock : kQuantizeThreads * 16 / size_of(x.dtype);
  const std::int64_t padded = ceil_div<std::int64_t>(x.rows(), by_block ? kQuantizeBlock : 1) *
                              (by_block ? kQuantizeBlock : 1) * ceil_div<std::int64_t>(x.cols(), kQuantizeBlock) *
                              kQuantizeBlock;
  const int num_ctas = int(std::min<std::int64_t>(ceil_div(padded, piece), device.num_sms * 8));
  kernel->launch({.num_ctas = num_ctas, .num_threads = kQuantizeThreads}, &p, stream.handle);
}

void quantize(const Tensor& x, const ScaledTensor& q, ScaleShape shape, const QuantizeOptions& options) {
  check_quantize(x, q, shape);
  if (x.rows() == 0 || x.cols() == 0) return;
  if (x.device.type == DeviceType::cuda)
    run_on_cuda(Direction::quantize, x, q, shape, options.pow2_scales, options.stream);
  else
    cpu::quantize(x, q, shape, options.pow2_scales);
}

}  // namespace

void quantize_rows(const Tensor& x, const ScaledTensor& q, const QuantizeOptions& options) {
  quantize(x, q, ScaleShape::row_1x128, options);
}

void quantize_blocks(const Tensor& x, const ScaledTensor& q, const QuantizeOptions& options) {
  quantize(x, q, ScaleShape::block_128x128, options);
}

void dequantize(const ScaledTensor& q, const Tensor& x, Stream stream) {
  const ScaleShape shape = check_dequantize(q, x);
  if (x.rows() == 0 || x.cols() == 0) return;
  if (x.device.type == DeviceType::cuda)
    run_on_cuda(Direction::dequantize, x, q, shape, false, stream);
  else
    cpu::dequantize(q, x, shape);
}

}  // namespace phalanx
