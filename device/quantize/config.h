// One description of a quantisation kernel: the generator prints it, the kernel is instantiated with it.
#pragma once
#include "../types.h"

namespace phalanx {

enum class FloatType { bf16, f16, f32 };
enum class ScaleShape { row_1x128, block_128x128 };

struct QuantizeConfig {
  FloatType type = FloatType::bf16;  // of the unquantised side
  ScaleShape shape = ScaleShape::row_1x128;

  friend constexpr bool operator==(const QuantizeConfig&, const QuantizeConfig&) = default;
};

constexpr int kQuantizeBlock = 128;
constexpr float kE4m3Max = 448.0f;
constexpr float kMinScale = 0x1p-126f;  // smallest normal float: its reciprocal is finite

// scale = max(amax / 448, 2^-126), rounded up to a power of two on request. Shared by the CPU and the GPU so that their
// bytes agree; `bits` and `from_bits` are the side's own bit casts.
constexpr u32 pow2_ceil_bits(u32 scale_bits) { return (scale_bits + 0x007fffffu) & 0x7f800000u; }

}  // namespace phalanx
