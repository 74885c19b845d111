#include "bindings/convert.h"

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/string.h>

#include <string>

namespace phalanx::python {
namespace {

using ffi::TensorView;

constexpr DLDataType kE4m3{kDLFloat8_e4m3fn, 8, 1}, kBf16{kDLBfloat, 16, 1}, kF16{kDLFloat, 16, 1},
    kF32{kDLFloat, 32, 1}, kI32{kDLInt, 32, 1}, kI64{kDLInt, 64, 1};

DType to_dtype(const char* name, DLDataType dtype) {
  if (dtype == kE4m3) return DType::e4m3;
  if (dtype == kBf16) return DType::bf16;
  if (dtype == kF16) return DType::f16;
  if (dtype == kF32) return DType::f32;
  if (dtype == kI32) return DType::int32;
  if (dtype == kI64) return DType::int64;
  throw Error(ErrorCode::invalid_dtype,
              std::string(name) + ": dtype " + std::string(ffi::DLDataTypeToString(dtype)) +
                  " is not supported; expected float8_e4m3fn, bfloat16, float16, float32, int32 or int64");
}

Device to_device(const char* name, DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost:
      return {DeviceType::cpu, 0};
    case kDLCUDA:
    case kDLCUDAManaged:
      return {DeviceType::cuda, device.device_id};
    default:
      throw Error(ErrorCode::invalid_device, std::string(name) + ": DLPack device type " +
                                                 std::to_string(static_cast<int>(device.device_type)) +
                                                 " is not supported; expected CPU or CUDA");
  }
}

TensorView to_view(const char* name, const AnyView& argument) {
  if (auto view = argument.try_cast<TensorView>()) return *view;
  // Or the kind of exception and its text: what Python could not make a view of.
  if (auto refused = argument.try_cast<ffi::Array<ffi::String>>(); refused && refused->size() == 2) {
    const ErrorCode code = (*refused)[0] == "TypeError" ? ErrorCode::invalid_dtype : ErrorCode::invalid_argument;
    throw Error(code, std::string(name) + ": " + std::string((*refused)[1]));
  }
  throw Error(ErrorCode::invalid_dtype, std::string(name) + ": expected an array, got " + argument.GetTypeKey());
}

}  // namespace

Tensor to_tensor(const char* name, const AnyView& argument) {
  const TensorView view = to_view(name, argument);
  Tensor tensor;
  tensor.data = static_cast<char*>(view.data_ptr()) + view.byte_offset();
  tensor.dtype = to_dtype(name, view.dtype());
  tensor.device = to_device(name, view.device());
  tensor.ndim = view.ndim();
  if (tensor.ndim > Tensor::kMaxDims) {
    throw Error(ErrorCode::invalid_argument,
                std::string(name) + ": " + std::to_string(tensor.ndim) + " dimensions; expected a matrix");
  }
  const auto shape = view.shape(), strides = view.strides();
  for (int i = 0; i < tensor.ndim; ++i) {
    tensor.shape[i] = shape[i];
    tensor.strides[i] = strides[i];
  }
  return tensor;
}

std::optional<Tensor> to_optional(const char* name, const AnyView& argument) {
  if (argument == nullptr) return std::nullopt;
  return to_tensor(name, argument);
}

Stream to_stream(const Device& device, const Optional<std::int64_t>& stream) {
  if (stream.has_value()) return {reinterpret_cast<void*>(static_cast<std::uintptr_t>(*stream))};
  return device.type == DeviceType::cpu ? Stream{} : Stream{TVMFFIEnvGetStream(kDLCUDA, device.index)};
}

int to_int(const char* name, const AnyView& argument) {
  const auto number = argument.try_cast<std::int64_t>();
  if (!number)
    throw Error(ErrorCode::invalid_dtype, std::string(name) + ": expected an integer, got " + argument.GetTypeKey());
  if (*number < INT32_MIN || *number > INT32_MAX)
    throw Error(ErrorCode::invalid_argument, std::string(name) + ": " + std::to_string(*number) + " is out of range");
  return static_cast<int>(*number);
}

bool to_bool(const char* name, const AnyView& argument) {
  if (const auto flag = argument.try_cast<bool>()) return *flag;
  throw Error(ErrorCode::invalid_dtype, std::string(name) + ": expected True or False, got " + argument.GetTypeKey());
}

const char* exception_name(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument:
    case ErrorCode::invalid_device:
      return "ValueError";
    case ErrorCode::invalid_dtype:
      return "TypeError";
    case ErrorCode::unsupported:
      return "phalanx.UnsupportedError";
    case ErrorCode::compilation_failed:
      return "phalanx.CompilationError";
    case ErrorCode::cuda_error:
      return "phalanx.CudaError";
    case ErrorCode::timeout:
      return "phalanx.PeerTimeoutError";
    case ErrorCode::aborted:
      return "phalanx.AbortedError";
    case ErrorCode::capacity_exceeded:
      return "phalanx.CapacityError";
  }
  return "RuntimeError";
}

}  // namespace phalanx::python
