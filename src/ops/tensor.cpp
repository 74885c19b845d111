// How tensors are named in messages.
#include "phalanx/tensor.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <span>

namespace phalanx {

const char* name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::e4m3:
      return "e4m3";
    case DType::bf16:
      return "bf16";
    case DType::f16:
      return "f16";
    case DType::f32:
      return "f32";
  }
  return "unknown dtype";
}

std::string to_string(const Tensor& tensor) {
  // Whatever the caller filled in, reading stays inside the arrays.
  const std::size_t ndim = std::clamp(tensor.ndim, 0, Tensor::kMaxDims);
  const std::span shape(tensor.shape.data(), ndim), strides(tensor.strides.data(), ndim);
  const std::string device =
      tensor.device.type == DeviceType::cpu && tensor.device.index == 0
          ? "cpu"
          : fmt::format("{}:{}", tensor.device.type == DeviceType::cpu ? "cpu" : "cuda", tensor.device.index);
  return fmt::format("{} [{}], strides [{}], {}", name_of(tensor.dtype), fmt::join(shape, ", "),
                     fmt::join(strides, ", "), device);
}

}  // namespace phalanx
