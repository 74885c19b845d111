// Products of BF16.
#pragma once
#include "device/ptx/wgmma_macros.h"

namespace phalanx::ptx {

// One k-block, 64 x N x 64, as four products of depth 16, else as WgmmaE4m3 does it. An MN-major operand (kMnA, kMnB)
// has a 128-byte line for each k: the next product begins 16 of them further on.
template <int N, bool kMnA, bool kMnB>
struct WgmmaBf16;

// The last four are numbers of operands: how far descriptors advance, and which are MN-major.
#define WGMMA_BF16(n, count, b_number, p_number, step_a, step_b, mn_a, mn_b)                                      \
  template <bool kMnA, bool kMnB>                                                                                 \
  struct WgmmaBf16<n, kMnA, kMnB> {                                                                               \
    WGMMA_MEMBERS(count, b_number, p_number,                                                                      \
                  WGMMA_FOUR_PRODUCTS("m64n" #n "k16.f32.bf16.bf16", count, ", %" #mn_a ", %" #mn_b, "%" #step_a, \
                                      "%" #step_b),                                                               \
                  , "n"(kMnA ? 128 : 2), "n"(kMnB ? 128 : 2), "n"(int(kMnA)), "n"(int(kMnB)))                     \
  };
WGMMA_BF16(64, 32, 33, 34, 35, 36, 37, 38)
WGMMA_BF16(128, 64, 65, 66, 67, 68, 69, 70)
WGMMA_BF16(192, 96, 97, 98, 99, 100, 101, 102)
WGMMA_BF16(256, 128, 129, 130, 131, 132, 133, 134)
#undef WGMMA_BF16

}  // namespace phalanx::ptx
