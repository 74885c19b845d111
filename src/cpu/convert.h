// Conversions between FP32 and the narrow formats, by integer arithmetic: exact in one direction, rounded to nearest
// even in the other, subnormals included, whatever the compiler's floating-point flags. All of them vectorise.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>

namespace phalanx::cpu {

// Distinct types for the storage of each format, so that overloads can tell them apart.
struct E4m3 {
  std::uint8_t bits;
};
struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

namespace detail {

constexpr std::uint32_t kSignBit = 0x80000000u;
constexpr std::uint32_t kInfinity = 0x7f800000u;

/// condition ? x : y without a branch: where a compiler respects floating-point traps, a branch would keep loops from
/// vectorising.
constexpr std::uint32_t select(bool condition, std::uint32_t x, std::uint32_t y) {
  return y ^ ((x ^ y) & (0u - condition));
}

/// The FP32 bits of a narrow format's magnitude bits (finite, no sign).
template <int kMantissaBits, int kBias>
constexpr std::uint32_t widen_magnitude(std::uint32_t magnitude) {
  constexpr int kShift = 23 - kMantissaBits;
  constexpr float kMinNormal = std::bit_cast<float>(std::uint32_t{128 - kBias} << 23);
  // A subnormal 0.m * 2^(1 - bias) is 1.m * 2^(1 - bias) less its implicit one.
  const float subnormal = std::bit_cast<float>((magnitude << kShift) + (std::uint32_t{128 - kBias} << 23)) - kMinNormal;
  const std::uint32_t normal = (magnitude << kShift) + (std::uint32_t{127 - kBias} << 23);
  return select(magnitude < (1u << kMantissaBits), std::bit_cast<std::uint32_t>(subnormal), normal);
}

/// A narrow format's magnitude bits, rounded to nearest even from the bits of a non-negative FP32 number that does not
/// overflow it.
template <int kMantissaBits, int kBias>
constexpr std::uint32_t narrow_magnitude(std::uint32_t magnitude) {
  constexpr int kShift = 23 - kMantissaBits;
  constexpr std::uint32_t kMinNormal = std::uint32_t{128 - kBias} << 23;
  // Half an ulp less the parity of the last bit kept: a carry into the exponent is what rounding up to a power of two
  // is.
  const std::uint32_t normal = ((magnitude + (1u << (kShift - 1)) - 1 + ((magnitude >> kShift) & 1)) >> kShift) -
                               ((127u - kBias) << kMantissaBits);
  // Added to a number whose ulp is the subnormal step, the FPU rounds to a multiple of that step.
  constexpr float kStepIsUlp = std::bit_cast<float>(std::uint32_t{127 + 23 - kMantissaBits + 1 - kBias} << 23);
  const std::uint32_t subnormal =
      std::bit_cast<std::uint32_t>(std::bit_cast<float>(std::min(magnitude, kMinNormal)) + kStepIsUlp) -
      std::bit_cast<std::uint32_t>(kStepIsUlp);
  return select(magnitude < kMinNormal, subnormal, normal);
}

}  // namespace detail

// --- to FP32, exact
// ------------------------------------------------------------------------------------------------------

constexpr float to_f32(float x) { return x; }

constexpr float to_f32(Bf16 x) { return std::bit_cast<float>(std::uint32_t{x.bits} << 16); }

constexpr float to_f32(F16 x) {
  const std::uint32_t magnitude = x.bits & 0x7fffu, sign = (x.bits & 0x8000u) << 16;
  const std::uint32_t finite = detail::widen_magnitude<10, 15>(magnitude);
  const std::uint32_t bits =
      detail::select(magnitude < 0x7c00u, finite, detail::kInfinity | (magnitude & 0x3ffu) << 13);
  return std::bit_cast<float>(sign | bits);
}

constexpr float to_f32(E4m3 x) {
  const std::uint32_t magnitude = x.bits & 0x7fu, sign = (x.bits & 0x80u) << 24;
  const std::uint32_t finite = detail::widen_magnitude<3, 7>(magnitude);
  return std::bit_cast<float>(sign | detail::select(magnitude < 0x7fu, finite, 0x7fffffffu));
}

// --- from FP32, rounded to nearest even
// ------------------------------------------------------------------------------------

template <class T>
constexpr T from_f32(float x);

/// NaN becomes the canonical one, as the GPU's conversions do.
template <>
constexpr float from_f32<float>(float x) {
  return x == x ? x : std::bit_cast<float>(0x7fffffffu);
}

/// Overflow becomes infinity, NaN 0x7fff.
template <>
constexpr Bf16 from_f32<Bf16>(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return {static_cast<std::uint16_t>(detail::select((bits & ~detail::kSignBit) > detail::kInfinity, 0x7fffu, rounded))};
}

/// Overflow becomes infinity, NaN 0x7fff.
template <>
constexpr F16 from_f32<F16>(float x) {
  constexpr std::uint32_t kOverflow = std::bit_cast<std::uint32_t>(65520.0f);  // halfway to 2^16, a tie that goes up
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x), magnitude = bits & ~detail::kSignBit;
  const std::uint32_t finite = detail::narrow_magnitude<10, 15>(std::min(magnitude, kOverflow));
  const std::uint32_t result = detail::select(magnitude < kOverflow, finite, 0x7c00u) | (bits & detail::kSignBit) >> 16;
  return {static_cast<std::uint16_t>(detail::select(magnitude > detail::kInfinity, 0x7fffu, result))};
}

/// Saturates at +-448, infinities too; NaN becomes 0x7f. This is PTX's cvt.rn.satfinite.e4m3x2.f32.
template <>
constexpr E4m3 from_f32<E4m3>(float x) {
  constexpr std::uint32_t kMax = std::bit_cast<std::uint32_t>(448.0f);
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x), magnitude = bits & ~detail::kSignBit;
  const std::uint32_t result =
      detail::narrow_magnitude<3, 7>(std::min(magnitude, kMax)) | (bits & detail::kSignBit) >> 24;
  return {static_cast<std::uint8_t>(detail::select(magnitude > detail::kInfinity, 0x7fu, result))};
}

/// Every E4M3 code's value.
inline constexpr std::array<float, 256> kE4m3Values = [] {
  std::array<float, 256> values{};
  for (unsigned code = 0; code < 256; ++code) values[code] = to_f32(E4m3{static_cast<std::uint8_t>(code)});
  return values;
}();

}  // namespace phalanx::cpu
