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
  int32,  ///< indices and counts
  int64,
};

constexpr int size_of(DType dtype) {
  switch (dtype) {
    case DType::e4m3:
      return 1;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::f32:
    case DType::int32:
      return 4;
    case DType::int64:
      break;
  }
  return 8;
}

/// "e4m3", "bf16", "f16", "f32", "int32" or "int64".
PHALANX_API const char* name_of(DType dtype) noexcept;

}  // namespace phalanx
