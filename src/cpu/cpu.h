// The CPU backend: the same operations on host memory. Arguments have been checked by src/ops.
#pragma once

#include "phalanx/gemm.h"
#include "phalanx/quantize.h"

namespace phalanx::cpu {

void gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const Tensor* c);

enum class Blocks { rows_1x128, blocks_128x128 };
void quantize(const Tensor& x, const ScaledTensor& q, Blocks blocks, bool pow2_scales);
void dequantize(const ScaledTensor& q, const Tensor& x, Blocks blocks);

}  // namespace phalanx::cpu
