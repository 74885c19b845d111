// What the bindings share: DLPack views in, phalanx::Tensor out, errors to Python's exceptions.
#pragma once
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <optional>

#include "phalanx/phalanx.h"

namespace phalanx::python {

namespace ffi = tvm::ffi;
using ffi::AnyView;  // every array comes as one, so that a wrong one is an error that names it
using ffi::Optional;

/// `name` is what an error calls the argument.
Tensor to_tensor(const char* name, const AnyView& argument);
/// None is no tensor.
std::optional<Tensor> to_optional(const char* name, const AnyView& argument);

/// `stream` is given by frameworks that tvm-ffi does not ask by itself; torch's it has put in its environment.
Stream to_stream(const Device& device, const Optional<std::int64_t>& stream);

// Options come as AnyView too, so that one of the wrong kind, or a number that does not fit, is an error that names it.
int to_int(const char* name, const AnyView& argument);
bool to_bool(const char* name, const AnyView& argument);

/// Names under which `phalanx._native` registers the exceptions.
const char* exception_name(ErrorCode code);

template <typename Call>
void translating_errors(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    throw ffi::Error(exception_name(error.code()), error.what(), "");
  }
}

}  // namespace phalanx::python
