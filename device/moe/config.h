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
constexpr int kPermuteThreads = 128;  // each moves 16 bytes of a token; small CTAs, so that there are many of them
constexpr int kScaleColumns = 8;      // of kPermuteThreads rows, that a CTA moves
constexpr int kUnpermuteThreads = 128;
constexpr int kBackwardThreads = 256;
// Routing and permuting in one kernel: every CTA ranks all entries, so that there may not be many.
constexpr int kFusedThreads = 512;
constexpr int kMaxFusedEntries = 2048;

}  // namespace phalanx
