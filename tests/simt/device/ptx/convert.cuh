#pragma once
#include "simt.h"

namespace phalanx::ptx {

inline u32 pack_bf16(float lo, float hi) {
  return cpu::from_f32<cpu::Bf16>(lo).bits | u32(cpu::from_f32<cpu::Bf16>(hi).bits) << 16;
}
inline u16 pack_e4m3(float lo, float hi) {
  return u16(cpu::from_f32<cpu::E4m3>(lo).bits | cpu::from_f32<cpu::E4m3>(hi).bits << 8);
}
inline float bf16_lo(u32 pair) { return __uint_as_float(pair << 16); }
inline float bf16_hi(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace phalanx::ptx
