// Operands of simulated products.
#pragma once
#include "simt.h"  // first: what CUDA C++ is to the device code

#include "device/ptx/tma.cuh"
#include "ops/check.h"

namespace phalanx::test {

inline TensorMap tensor_map(const Tensor& t, int box_rows, int box_cols, bool swizzle = true) {
  return ptx::SimtTensorMap{static_cast<u8*>(t.data), t.rows(), t.cols(), row_stride(t) * size_of(t.dtype),
                            int(size_of(t.dtype)),    box_rows, box_cols, swizzle};
}

/// `groups` matrices, one under the other, as a stack.
inline Tensor stack(const Tensor& t, int groups) {
  const std::int64_t rows = t.shape[0] / groups;
  return {t.data, t.dtype, t.device, 3, {groups, rows, t.shape[1]}, {rows * t.strides[0], t.strides[0], t.strides[1]}};
}

}  // namespace phalanx::test
