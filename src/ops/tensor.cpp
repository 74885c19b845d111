// How tensors are named in messages.
#include "phalanx/tensor.h"

#include <algorithm>

#include "ops/check.h"

namespace phalanx {
namespace {

std::string list_of(const std::array<std::int64_t, Tensor::kMaxDims>& values, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return "[" + text + "]";
}

}  // namespace

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
    case DType::int32:
      return "int32";
    case DType::int64:
      return "int64";
  }
  return "unknown dtype";
}

std::string to_string(const Device& device) {
  if (device == Device{}) return "cpu";
  return (device.type == DeviceType::cpu ? "cpu:" : "cuda:") + std::to_string(device.index);
}

std::string to_string(const Tensor& tensor) {
  // Whatever the caller filled in, reading stays inside the arrays.
  const int ndim = std::clamp(tensor.ndim, 0, Tensor::kMaxDims);
  return std::string(name_of(tensor.dtype)) + " " + list_of(tensor.shape, ndim) + ", strides " +
         list_of(tensor.strides, ndim) + ", " + to_string(tensor.device);
}

}  // namespace phalanx
