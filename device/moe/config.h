// One description of an un-permuting kernel: the generator prints it, the kernel is instantiated with it.
#pragma once
#include "device/types.h"

namespace phalanx {

// Element types: FP32 where true, else BF16.
struct UnpermuteConfig {
  bool rows_f32 = false;
  bool tokens_f32 = false;  // result and residual, or in the backward pass their gradient

  friend constexpr bool operator==(const UnpermuteConfig&, const UnpermuteConfig&) = default;
};

constexpr int kRouteThreads = 1024;
constexpr int kMinPermuteThreads = 64, kMaxPermuteThreads = 512;  // each moves 16 bytes of a token
constexpr int kPermuteCtas = 4;                                   // of an SM, of as many threads as there may be
constexpr int kScaleColumns = 8;                                  // of a CTA that sees to rows
constexpr int kClearedVectors = 64;  // the same CTA's part of a padding row: of E4M3, what those scales belong to
constexpr int kUnpermuteThreads = 128;
constexpr int kBackwardThreads = 256;
// Routing and permuting in one kernel: every CTA ranks all entries, so that there may not be many.
constexpr int kFusedThreads = 512;
constexpr int kMaxFusedEntries = 2048;

constexpr int kCtasAtOnce = 132 * kPermuteCtas;

// As few as leave all CTAs on the GPU at once, so that few tokens are spread over many SMs; then in even pieces of a
// token.
constexpr int permute_threads(i64 tokens, int row_vectors) {
  int threads = kMinPermuteThreads;
  while (threads < kMaxPermuteThreads && tokens * ceil_div(row_vectors, threads) > kCtasAtOnce) threads *= 2;
  const int even = ceil_div(ceil_div(row_vectors, ceil_div(row_vectors, threads)), 32) * 32;
  return even > kMinPermuteThreads ? even : kMinPermuteThreads;
}

}  // namespace phalanx
