#pragma once
#include "simt.h"

namespace phalanx::ptx {

inline u32 pack_bf16(float lo, float hi) {
  return cpu::from_f32<cpu::Bf16>(lo).bits | u32(cpu::from_f32<cpu::Bf16>(hi).bits) << 16;
}
inline u16 pack_e4m3(float lo, float hi) {
  return u16(cpu::from_f32<cpu::E4m3>(lo).bits | cpu::from_f32<cpu::E4m3>(hi).bits << 8);
}
inline u32 pack_f16(float lo, float hi) {
  return cpu::from_f32<cpu::F16>(lo).bits | u32(cpu::from_f32<cpu::F16>(hi).bits) << 16;
}
inline float f16_to_float(u16 bits) { return cpu::to_f32(cpu::F16{bits}); }
inline float bf16_to_float(u16 bits) { return __uint_as_float(u32(bits) << 16); }
inline float2 e4m3_pair_to_float(u16 pair) {
  return {cpu::to_f32(cpu::E4m3{u8(pair)}), cpu::to_f32(cpu::E4m3{u8(pair >> 8)})};
}
inline float bf16_lo(u32 pair) { return __uint_as_float(pair << 16); }
inline float bf16_hi(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace phalanx::ptx
