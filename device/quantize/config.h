// One description of a quantisation kernel: the generator prints it, the kernel is instantiated with it.
#pragma once
#include "device/types.h"

namespace phalanx {

enum class FloatType { bf16, f16, f32 };
enum class ScaleShape { row_1x128, block_128x128 };

struct QuantizeConfig {
  FloatType type = FloatType::bf16;  // of the unquantised side
  ScaleShape shape = ScaleShape::row_1x128;

  friend constexpr bool operator==(const QuantizeConfig&, const QuantizeConfig&) = default;
};

constexpr int kQuantizeBlock = 128;    // columns (and rows) that share a scale
constexpr int kQuantizeThreads = 256;  // of a CTA
constexpr float kE4m3Max = 448.0f;
constexpr float kMinScale = 0x1p-126f;  // smallest normal float: its reciprocal is finite

// Bits of the smallest power of two that is not below the positive normal float with these bits.
constexpr u32 pow2_ceil_bits(u32 scale_bits) { return (scale_bits + 0x007fffffu) & 0x7f800000u; }

}  // namespace phalanx
