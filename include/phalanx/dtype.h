// Element types.
#pragma once

#include <cstdint>

#include "phalanx/export.h"

namespace phalanx {

enum class DType : std::uint8_t {
  e4m3,  ///< 8-bit float, 4 exponent and 3 mantissa bits, no infinity, largest value 448 (OCP FP8, "e4m3fn")
  bf16,
  f16,
  f32,
};

constexpr int size_of(DType dtype) { return dtype == DType::e4m3 ? 1 : dtype == DType::f32 ? 4 : 2; }

/// "e4m3", "bf16", "f16" or "f32".
PHALANX_API const char* name_of(DType dtype) noexcept;

}  // namespace phalanx
