// The device code, as the build put it inside the library.
#pragma once

#include <span>
#include <string_view>

namespace phalanx::jit {

struct EmbeddedFile {
  const char* name;  ///< as it is included: "device/gemm/config.h"
  std::string_view text;
};

/// Every file below device/, sorted by name.
std::span<const EmbeddedFile> device_sources();

}  // namespace phalanx::jit
