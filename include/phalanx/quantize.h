// Quantisation to E4M3 with one FP32 scale per block, and back.
#pragma once

#include "phalanx/export.h"
#include "phalanx/status.h"
#include "phalanx/stream.h"
#include "phalanx/tensor.h"

namespace phalanx {

struct QuantizeOptions {
  bool pow2_scales = false;  ///< round scales up to powers of two
  Stream stream{};
};

/// q.data = round(x / q.scales), one scale per 1 x 128 block of a row: the activations' format.
///
/// With amax the largest finite |x| of the block, scale = max(amax / 448, 2^-126), then
/// element = round_to_nearest_even(x * (1 / scale)), all in FP32. Infinities saturate to +-448, NaN stays NaN.
/// CPU and CUDA give the same bytes.
///
/// @param x  BF16, FP16 or FP32 [M, K], rows contiguous, any row stride
/// @param q  data E4M3 [M, K], rows contiguous; scales FP32 [M, ceil(K / 128)], any strides
/// @throws Error before anything is written
PHALANX_API void quantize_rows(const Tensor& x, const ScaledTensor& q, const QuantizeOptions& options = {});

/// The same with one scale per 128 x 128 block: the weights' format. Scales FP32 [ceil(N / 128), ceil(K / 128)], any
/// strides.
PHALANX_API void quantize_blocks(const Tensor& x, const ScaledTensor& q, const QuantizeOptions& options = {});

/// q = quantize_rows of x's transpose: x [M, K] gives data E4M3 [K, M] and scales FP32 [K, ceil(M / 128)], one per 128
/// rows of a column of x. That is the operand of a product over x's rows, as the weights' gradient is.
PHALANX_API void quantize_transposed(const Tensor& x, const ScaledTensor& q, const QuantizeOptions& options = {});

/// quantize_rows and quantize_transposed, reading x once.
PHALANX_API void quantize_both(const Tensor& x, const ScaledTensor& q, const ScaledTensor& q_t,
                               const QuantizeOptions& options = {});

/// x = q.data * q.scales, rounded once to x's dtype. The scales' shape tells the blocks: one row of scales per row of
/// data is 1 x 128, one per 128 rows is 128 x 128 (the two agree when there is only one row).
PHALANX_API void dequantize(const ScaledTensor& q, const Tensor& x, Stream stream = {});

}  // namespace phalanx
