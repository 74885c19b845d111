// The one compiled module of the Python package: DLPack views in, phalanx::Tensor out, errors to Python's exceptions.
// It knows neither Python's C API nor any framework, so one binary serves every Python and every framework.
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "phalanx/phalanx.h"

namespace phalanx::python {
namespace {

namespace ffi = tvm::ffi;
using ffi::AnyView;  // every array comes as one, so that a wrong one is an error that names it
using ffi::Optional;
using ffi::TensorView;

// Names under which `phalanx._native` registers the exceptions.
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
  }
  return "RuntimeError";
}

// --- from DLPack --------------------------------------------------------------------------------------------------------

constexpr DLDataType kE4m3{kDLFloat8_e4m3fn, 8, 1}, kBf16{kDLBfloat, 16, 1}, kF16{kDLFloat, 16, 1},
    kF32{kDLFloat, 32, 1};

DType to_dtype(const char* name, DLDataType dtype) {
  if (dtype == kE4m3) return DType::e4m3;
  if (dtype == kBf16) return DType::bf16;
  if (dtype == kF16) return DType::f16;
  if (dtype == kF32) return DType::f32;
  throw Error(ErrorCode::invalid_dtype, std::string(name) + ": dtype " + std::string(ffi::DLDataTypeToString(dtype)) +
                                            " is not supported; expected float8_e4m3fn, bfloat16, float16 or float32");
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
  throw Error(ErrorCode::invalid_dtype, std::string(name) + ": expected an array, got " + argument.GetTypeKey());
}

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

// `stream` is given by frameworks that tvm-ffi does not ask by itself; torch's it has put in its environment.
Stream to_stream(const Device& device, const Optional<std::int64_t>& stream) {
  if (stream.has_value()) return {reinterpret_cast<void*>(static_cast<std::uintptr_t>(*stream))};
  return device.type == DeviceType::cpu ? Stream{} : Stream{TVMFFIEnvGetStream(kDLCUDA, device.index)};
}

// --- to the core --------------------------------------------------------------------------------------------------------

template <typename Call>
void translating_errors(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    throw ffi::Error(exception_name(error.code()), error.what(), "");
  }
}

void gemm_fp8(AnyView a_data, AnyView a_scales, AnyView b_data, AnyView b_scales, AnyView d, AnyView c,
              std::int64_t num_sms, Optional<std::int64_t> stream) {
  translating_errors([&] {
    if (num_sms < 0 || num_sms > INT32_MAX) {
      throw Error(ErrorCode::invalid_argument,
                  "num_sms: " + std::to_string(num_sms) + "; expected the number of SMs to use, or 0 for all");
    }
    const ScaledTensor a{to_tensor("a.data", a_data), to_tensor("a.scales", a_scales)};
    const ScaledTensor b{to_tensor("b.data", b_data), to_tensor("b.scales", b_scales)};
    GemmOptions options;
    if (c != nullptr) options.c = to_tensor("c", c);
    options.stream = to_stream(a.data.device, stream);
    options.num_sms = static_cast<int>(num_sms);
    phalanx::gemm_fp8(a, b, to_tensor("d", d), options);
  });
}

void quantize(AnyView x_data, AnyView q_data, AnyView q_scales, bool blocks, bool pow2_scales,
              Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor x = to_tensor("x", x_data);
    const ScaledTensor q{to_tensor("q.data", q_data), to_tensor("q.scales", q_scales)};
    const QuantizeOptions options{.pow2_scales = pow2_scales, .stream = to_stream(x.device, stream)};
    (blocks ? quantize_blocks : quantize_rows)(x, q, options);
  });
}

void dequantize(AnyView q_data, AnyView q_scales, AnyView x, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const ScaledTensor q{to_tensor("q.data", q_data), to_tensor("q.scales", q_scales)};
    phalanx::dequantize(q, to_tensor("x", x), to_stream(q.data.device, stream));
  });
}

ffi::String version() { return phalanx::version(); }

// --- views of arrays that DLPack cannot express ---------------------------------------------------------------------------

struct View {
  DLManagedTensor tensor{};
  std::vector<std::int64_t> shape, strides;
};

// A tensor over memory that the caller keeps alive: for arrays whose own __dlpack__ knows no E4M3 or BF16, or refuses
// read-only memory.
ffi::Tensor view(std::int64_t address, DLDataType dtype, ffi::Shape shape, ffi::Shape strides, DLDevice device) {
  auto owner = std::make_unique<View>();
  owner->shape.assign(shape.begin(), shape.end());
  owner->strides.assign(strides.begin(), strides.end());
  if (owner->shape.size() != owner->strides.size())
    throw ffi::Error("ValueError", "shape and strides differ in length", "");
  owner->tensor.dl_tensor = {.data = reinterpret_cast<void*>(static_cast<std::uintptr_t>(address)),
                             .device = device,
                             .ndim = static_cast<std::int32_t>(owner->shape.size()),
                             .dtype = dtype,
                             .shape = owner->shape.data(),
                             .strides = owner->strides.data(),
                             .byte_offset = 0};
  owner->tensor.manager_ctx = owner.get();
  owner->tensor.deleter = [](DLManagedTensor* self) { delete static_cast<View*>(self->manager_ctx); };
  return ffi::Tensor::FromDLPack(&owner.release()->tensor);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8, gemm_fp8)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize, quantize)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequantize, dequantize)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, version)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(view, view)

}  // namespace phalanx::python
