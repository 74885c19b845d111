// Products of E4M3.
#pragma once
#include "device/ptx/wgmma_macros.h"

namespace phalanx::ptx {

// One k-block, 64 x N x 128, as four products of depth 32: d = A · Bᵀ, or d += A · Bᵀ. The descriptors are those of the
// first; the operands are K-major with the 128-byte swizzle. Asynchronous, in a commit group of its own.
template <int N>
struct WgmmaE4m3;

#define WGMMA_E4M3(n, count, b_number, p_number)                                                                      \
  template <>                                                                                                         \
  struct WgmmaE4m3<n> {                                                                                               \
    WGMMA_MEMBERS(count, b_number, p_number, WGMMA_FOUR_PRODUCTS("m64n" #n "k32.f32.e4m3.e4m3", count, "", "2", "2")) \
  };
WGMMA_E4M3(8, 4, 5, 6)
WGMMA_E4M3(16, 8, 9, 10)
WGMMA_E4M3(32, 16, 17, 18)
WGMMA_E4M3(64, 32, 33, 34)
WGMMA_E4M3(96, 48, 49, 50)
WGMMA_E4M3(128, 64, 65, 66)
WGMMA_E4M3(192, 96, 97, 98)
WGMMA_E4M3(256, 128, 129, 130)
#undef WGMMA_E4M3

}  // namespace phalanx::ptx
