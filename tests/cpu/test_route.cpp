// The pure parts of routing, which host and device share.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "device/moe/config.h"
#include "device/moe/route.h"
#include "phalanx/moe.h"
#include "tests/cpu/matrix.h"
#include "tests/testing.h"

namespace phalanx::test {
namespace {

TEST(Route, WarpsShareTheEntriesInOrder) {
  std::mt19937 rng(kSeed);
  for (int i = 0; i < 2000; ++i) {
    const int num_entries = int(rng() % (1u << (rng() % 20))), num_warps = 1 << rng() % 9;
    int next = 0;
    for (int warp = 0; warp < num_warps; ++warp) {
      const EntryRange range = entries_of_warp(num_entries, warp, num_warps);
      ASSERT_EQ(range.begin, next) << num_entries << " entries, warp " << warp << " of " << num_warps;
      ASSERT_GE(range.end, range.begin);
      next = range.end;
    }
    ASSERT_EQ(next, num_entries);
  }
  EXPECT_EQ(entries_of_warp(kMaxEntries, 255, 256).end, kMaxEntries);
}

TEST(Route, ExpertsGetRowsOfTheirOwnInsideTheTarget) {
  std::mt19937 rng(kSeed);
  for (int i = 0; i < 2000; ++i) {
    const int experts = 1 + int(rng() % 20);
    RouteTarget target{.num_rows = int(rng() % 200), .alignment = 1 << rng() % 5, .max_rows = 0};
    if (rng() % 2) target = {.num_rows = experts * 7, .alignment = 1, .max_rows = 7};
    int taken = 0, end = 0;
    for (int e = 0; e < experts; ++e) {
      const int count = int(rng() % 30), first = first_row(target, e, taken), fit = rows_that_fit(target, first, count);
      ASSERT_GE(first, end);
      ASSERT_GE(fit, 0);
      ASSERT_LE(fit, count);
      ASSERT_LE(first + fit, target.num_rows);
      if (!target.masked() && first < target.num_rows) {
        ASSERT_EQ(first % target.alignment, 0);
      }
      if (fit < count) {
        ASSERT_TRUE(target.masked() ? fit == target.max_rows : first + fit == target.num_rows);
      }
      taken += rows_taken(target, count), end = first + fit;
    }
    ASSERT_LE(end, first_row(target, experts, taken));
  }
}

TEST(Route, PiecesOfTokensAreEven) {
  std::mt19937 rng(kSeed);
  for (int i = 0; i < 2000; ++i) {
    const int tokens = int(rng() % (rng() % 2 ? 100 : 10000)), vectors = 1 + int(rng() % (rng() % 2 ? 100 : 5000));
    const int threads = permute_threads(tokens, vectors), pieces = ceil_div(vectors, threads);
    ASSERT_TRUE(threads % 32 == 0 && threads >= kMinPermuteThreads && threads <= kMaxPermuteThreads) << threads;
    ASSERT_LT(pieces * threads - vectors, std::max(32 * pieces, kMinPermuteThreads)) << tokens << ", " << vectors;
  }
  EXPECT_EQ(permute_threads(1, 448), 64);
  EXPECT_EQ(permute_threads(4096, 448), 448);
}

/// A vector of int32 between guards.
class Ints {
 public:
  explicit Ints(std::int64_t size) : memory_(size + 2, kGuard) {}
  Tensor vector() { return {memory_.data() + 1, DType::int32, {}, 1, {size()}, {1}}; }
  Tensor matrix(std::int64_t cols) { return row_major(memory_.data() + 1, DType::int32, size() / cols, cols); }
  std::vector<int> values() const {
    EXPECT_TRUE(memory_.front() == kGuard && memory_.back() == kGuard) << "written outside";
    return {memory_.begin() + 1, memory_.end() - 1};
  }

 private:
  static constexpr int kGuard = -77;
  std::int64_t size() const { return std::int64_t(memory_.size()) - 2; }

  std::vector<int> memory_;
};

TEST(Route, WritesItsOutputsAndNothingElse) {
  using List = std::vector<int>;
  int topk_idx[] = {2, 0, 2, -1, 0, 5, 2, 2};  // four tokens, two choices, three experts
  Ints counts(3), offsets(4), slots(8), sources(7), needed(1);
  const Routing routing{counts.vector(), offsets.vector(), slots.matrix(2), sources.vector(), needed.vector()};
  route(row_major(topk_idx, DType::int32, 4, 2), routing, {.alignment = 4, .max_rows = 0, .stream = {}});
  EXPECT_EQ(counts.values(), (List{2, 0, 3}));
  EXPECT_EQ(offsets.values(), (List{0, 4, 4, 7}));
  EXPECT_EQ(slots.values(), (List{4, 0, 5, -1, 1, -1, 6, -1}));
  EXPECT_EQ(sources.values(), (List{1, 4, -1, -1, 0, 2, 6}));
  EXPECT_EQ(needed.values(), (List{8}));
}

TEST(Route, WhatOneKernelWritesLiesApart) {
  constexpr int kTokens = 4, kTopK = 2, kExperts = 3, kRows = 8, kHidden = 256;
  // topk_idx is longer than it has to be, so that what is moved onto it overlaps nothing else
  std::vector<int> topk_idx(kTokens * kHidden), ints(64);
  std::vector<std::uint8_t> bytes(8192);
  const Tensor topk = row_major(topk_idx.data(), DType::int32, kTokens, kTopK);
  const auto vector = [&](int at, int size) { return Tensor{&ints[at], DType::int32, {}, 1, {size}, {1}}; };
  const Routing routing{vector(0, kExperts), vector(4, kExperts + 1), row_major(&ints[8], DType::int32, kTokens, kTopK),
                        vector(24, kRows), vector(40, 1)};
  // x, q and its scales, rows and their scales
  const Tensor x = row_major(&bytes[0], DType::bf16, kTokens, kHidden);
  const ScaledTensor q{row_major(&bytes[2048], DType::e4m3, kTokens, kHidden),
                       row_major(&bytes[3072], DType::f32, kTokens, 2)};
  const ScaledTensor rows{row_major(&bytes[4096], DType::e4m3, kRows, kHidden),
                          row_major(&bytes[6144], DType::f32, kRows, 2)};
  quantize_route_and_permute(x, q, topk, routing, rows, false);
  const auto moved = [](Tensor t, const Tensor& onto) { return t.data = onto.data, t; };
  const auto refused = [](const char* written, const char* other, auto&& call) {
    expect_error(ErrorCode::invalid_argument, {written, other}, call);
  };
  const auto with = [&](const ScaledTensor& to_q, const Routing& to, const ScaledTensor& to_rows) {
    quantize_route_and_permute(x, to_q, topk, to, to_rows, false);
  };
  refused("q.data", "topk_idx", [&] { with({moved(q.data, topk), q.scales}, routing, rows); });
  refused("q.scales", "topk_idx", [&] { with({q.data, moved(q.scales, topk)}, routing, rows); });
  refused("rows.scales", "x", [&] { with(q, routing, {rows.data, moved(rows.scales, x)}); });
  for (Tensor Routing::*part :
       {&Routing::counts, &Routing::offsets, &Routing::slots, &Routing::sources, &Routing::needed}) {
    for (const Tensor* onto : {&x, &q.data, &q.scales, &rows.data, &rows.scales}) {
      Routing over = routing;
      over.*part = moved(routing.*part, *onto);
      refused("routing.", "overlaps", [&] { with(q, over, rows); });
    }
    Routing over = routing;
    over.*part = moved(routing.*part, x);
    refused("routing.", "x", [&] { route_and_permute(x, topk, over, moved(x, rows.data), false); });
  }
}

}  // namespace
}  // namespace phalanx::test
