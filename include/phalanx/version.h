// Version of the headers you compile against; `phalanx::version()` is that of the library you run with.
#pragma once

#include "phalanx/export.h"

#define PHALANX_VERSION_MAJOR 0
#define PHALANX_VERSION_MINOR 1
#define PHALANX_VERSION_PATCH 0
#define PHALANX_VERSION_STRING "0.1.0"

namespace phalanx {

/// "major.minor.patch" of the loaded shared library.
PHALANX_API const char* version() noexcept;

}  // namespace phalanx
