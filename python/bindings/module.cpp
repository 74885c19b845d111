// The one compiled module of the Python package. It knows neither Python's C API nor any framework, so one binary
// serves every Python and every framework. Here: its version, and views of arrays that DLPack cannot express.
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/string.h>

#include <memory>
#include <vector>

#include "bindings/convert.h"

namespace phalanx::python {
namespace {

ffi::String version() { return phalanx::version(); }

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

TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, version)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(view, view)

}  // namespace phalanx::python
