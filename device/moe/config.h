// One description of an un-permuting kernel: the generator prints it, the kernel is instantiated with it.
#pragma once

namespace phalanx {

// Element types: FP32 where true, else BF16.
struct UnpermuteConfig {
  bool rows_f32 = false;
  bool tokens_f32 = false;  // result and residual, or in the backward pass their gradient

  friend constexpr bool operator==(const UnpermuteConfig&, const UnpermuteConfig&) = default;
};

constexpr int kRouteThreads = 1024;
constexpr int kPermuteThreads = 256;
constexpr int kPermuteVectors = 4;  // of 16 bytes, that a lane moves at a time
constexpr int kPermutePieceVectors = 32 * kPermuteVectors;
constexpr int kUnpermuteThreads = 256;
// Routing and permuting in one kernel: every CTA ranks all entries, so that there may not be many.
constexpr int kFusedThreads = 512;
constexpr int kMaxFusedEntries = 2048;

}  // namespace phalanx
