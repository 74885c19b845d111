// Products of TF32.
#pragma once
#include "device/ptx/wgmma_macros.h"

namespace phalanx::ptx {

// 64 x N x 8, one product, else as WgmmaE4m3 does it. The operands are K-major without a swizzle
// (wgmma_descriptor_halves).
template <int N>
struct WgmmaTf32;

template <>
struct WgmmaTf32<128> {
  WGMMA_MEMBERS(64, 65, 66, WGMMA_PRODUCT("m64n128k8.f32.tf32.tf32", 64, "p", ""))
};

}  // namespace phalanx::ptx
