// Tensors as the kernels of device/quantize take them.
#pragma once

#include <cstdint>

#include "device/quantize/config.h"
#include "device/quantize/params.h"
#include "ops/check.h"

namespace phalanx {

constexpr int kNumFloatTypes = 3;

inline FloatType float_type(DType dtype) {
  return dtype == DType::bf16 ? FloatType::bf16 : dtype == DType::f16 ? FloatType::f16 : FloatType::f32;
}

inline ScaledMatrix scaled_matrix(const ScaledTensor& q) {
  return {.data = static_cast<u8*>(q.data.data),
          .stride = row_stride(q.data),
          .scales = static_cast<float*>(q.scales.data),
          .scale_stride_row = q.scales.strides[0],
          .scale_stride_col = q.scales.strides[1]};
}

/// Whether the base and the rows of a matrix are aligned to `bytes`.
inline bool rows_are_aligned(const Tensor& x, int bytes) {
  return (reinterpret_cast<std::uintptr_t>(x.data) | std::uintptr_t(row_stride(x) * size_of(x.dtype))) % bytes == 0;
}

/// Whether `cols` columns, from the start of x and of q (if there is one), consist of pieces of 16 bytes of x and of
/// what these are in q, all aligned to their sizes.
inline bool has_vectors(const Tensor& x, const Tensor* q, std::int64_t cols) {
  const int count = piece_count(float_type(x.dtype));
  return cols % count == 0 && rows_are_aligned(x, 16) && (!q || rows_are_aligned(*q, count));
}

}  // namespace phalanx
