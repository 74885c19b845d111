// A tensor is a view: the caller owns the memory, which must outlive the work that was enqueued on it.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "phalanx/dtype.h"
#include "phalanx/export.h"

namespace phalanx {

enum class DeviceType : std::uint8_t { cpu, cuda };

struct Device {
  DeviceType type = DeviceType::cpu;
  int index = 0;  ///< CUDA ordinal; 0 on the CPU

  friend constexpr bool operator==(const Device&, const Device&) = default;
};

/// A strided view of up to four dimensions.
struct Tensor {
  static constexpr int kMaxDims = 4;

  void* data = nullptr;
  DType dtype = DType::f32;
  Device device{};
  int ndim = 0;
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> strides{};  ///< in elements

  /// Of a matrix (ndim == 2).
  std::int64_t rows() const { return shape[0]; }
  std::int64_t cols() const { return shape[1]; }
};

/// A row-major matrix; `row_stride` (elements) defaults to `cols`.
inline Tensor row_major(void* data, DType dtype, std::int64_t rows, std::int64_t cols, Device device = {},
                        std::int64_t row_stride = -1) {
  return {data, dtype, device, 2, {rows, cols}, {row_stride < 0 ? cols : row_stride, 1}};
}

/// A column-major (of scales: "MN-major") matrix; `col_stride` (elements) defaults to `rows`.
inline Tensor col_major(void* data, DType dtype, std::int64_t rows, std::int64_t cols, Device device = {},
                        std::int64_t col_stride = -1) {
  return {data, dtype, device, 2, {rows, cols}, {1, col_stride < 0 ? rows : col_stride}};
}

/// The i-th matrix of a stack (ndim == 3).
inline Tensor matrix_of(const Tensor& stack, std::int64_t i) {
  return {static_cast<char*>(stack.data) + i * stack.strides[0] * size_of(stack.dtype),
          stack.dtype,
          stack.device,
          2,
          {stack.shape[1], stack.shape[2]},
          {stack.strides[1], stack.strides[2]}};
}

/// An E4M3 matrix, or a stack of them, with one FP32 scale per block: value = data * scale.
struct ScaledTensor {
  Tensor data;
  Tensor scales;
};

/// "bf16 [64, 7168], strides [7168, 1], cuda:0": how error messages name a tensor.
PHALANX_API std::string to_string(const Tensor& tensor);

}  // namespace phalanx
