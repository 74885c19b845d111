// Every kernel of the BF16 products, on shapes and groups that reach its features: the CPU's bits, and poison all
// around. Short enough to run under each tool of compute-sanitizer. Operands are small integers: every sum is exact in
// every order.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <vector>

#include "jit/kernels.h"
#include "phalanx/phalanx.h"
#include "plan/bf16.h"
#include "plan/tuned.h"
#include "tests/cpu/matrix.h"
#include "tests/gpu/groups.h"
#include "tests/gpu/on_gpu.h"

namespace phalanx::test {
namespace {

using cpu::Bf16;

// The process tunes: the operations read the variable at each call.
const bool kTuning = setenv("PHALANX_GEMM_CONFIG", "", 1) == 0;

void force(const GemmConfig& config) {
  setenv("PHALANX_GEMM_CONFIG", plan::format_plan({.config = config, .num_ctas = 0, .group_m = 8}).c_str(), 1);
}

/// `rows` x `cols` small integers of either major, on both sides.
struct Integers {
  Matrix<Bf16> host;
  DeviceCopy<Bf16> gpu;

  Integers(int rows, int cols, Major major, std::mt19937& rng)
      : host(Matrix<Bf16>(rows, cols, 1, major == Major::k ? Order::row_major : Order::col_major).fill([&](auto, auto) {
          return cpu::from_f32<Bf16>(float(int(rng() % 9) - 4));
        })),
        gpu(host) {}
};

template <class T>
void check_dense(const GemmConfig& config, int m, int n, int k, bool with_c, std::mt19937& rng) {
  Integers a(m, k, config.major_a, rng), b(n, k, config.major_b, rng);
  Matrix<T> c(m, n, 1), d(m, n, 2);
  c.fill([&](auto, auto) { return cpu::from_f32<T>(float(int(rng() % 17) - 8)); });
  DeviceCopy c_gpu(c), d_gpu(d);
  force(config);
  const auto options = [&](const Tensor& tensor) { return with_c ? GemmOptions{.c = tensor} : GemmOptions{}; };
  gemm_bf16(a.gpu.tensor(), b.gpu.tensor(), d_gpu.tensor(), options(c_gpu.tensor()));
  const Matrix<T> result = d_gpu.download();
  gemm_bf16(a.host.tensor(), b.host.tensor(), d.tensor(), options(c.tensor()));
  ASSERT_TRUE(result.same_bytes(d)) << "the bits of the CPU's result, and poison all around it";
}

/// Experts side by side: the groups of an MN-major stack follow each other along K.
Tensor experts(const Tensor& t, Major major, int n, int k) {
  const std::int64_t line = major == Major::k ? t.strides[0] : t.strides[1];
  Tensor s{t.data, t.dtype, t.device, 3, {kNumGroups, n, k}, {(major == Major::k ? n : k) * line, line, 1}};
  if (major == Major::mn) std::swap(s.strides[1], s.strides[2]);
  return s;
}

template <class T>
void check_rows(const GemmConfig& config, GroupsBy by, std::mt19937& rng) {
  constexpr int kN = 200, kK = 400;
  const bool masked = by == GroupsBy::counts, k_major = config.major_b == Major::k;
  const int rows = masked ? kNumGroups * kGroups.max_rows : int(kGroups.row_groups.size());
  Integers a(rows, kK, Major::k, rng);
  Integers b(k_major ? kNumGroups * kN : kN, k_major ? kK : kNumGroups * kK, config.major_b, rng);
  Matrix<T> d(rows, kN, 2);
  DeviceCopy d_gpu(d);
  Ints groups(kGroups.by(by));

  const auto run = [&](Tensor a_, Tensor b_, Tensor groups_, Tensor d_) {
    const Tensor stacked = experts(b_, config.major_b, kN, kK);
    groups_ = Ints::vector(groups_);
    if (by == GroupsBy::offsets)
      grouped_gemm_bf16(a_, stacked, groups_, d_);
    else if (by == GroupsBy::row_groups)
      grouped_gemm_bf16_indexed(a_, stacked, groups_, d_);
    else
      grouped_gemm_bf16_masked(stack(a_, kNumGroups), stacked, groups_, stack(d_, kNumGroups));
  };
  force(config);
  run(a.gpu.tensor(), b.gpu.tensor(), groups.gpu.tensor(), d_gpu.tensor());
  const Matrix<T> result = d_gpu.download();
  run(a.host.tensor(), b.host.tensor(), groups.host.tensor(), d.tensor());
  ASSERT_TRUE(result.same_bytes(d)) << "the bits of the CPU's result, and poison in rows of no group";
  check_groups({DeviceType::cuda, 0});
}

void check_columns(const GemmConfig& config, bool accumulate, std::mt19937& rng) {
  constexpr int kM = 150, kN = 200;
  const int tokens = kGroups.offsets.back() + 20;
  Integers a(tokens, kM, Major::k, rng), b(tokens, kN, Major::k, rng);
  Matrix<float> d(kNumGroups * kM, kN, 1);
  if (accumulate) d.fill([&](auto, auto) { return float(rng() % 9); });
  DeviceCopy d_gpu(d);
  Ints offsets(kGroups.offsets);
  const WgradOptions options{.accumulate = accumulate};
  force(config);
  grouped_wgrad_bf16(a.gpu.tensor(), b.gpu.tensor(), Ints::vector(offsets.gpu.tensor()),
                     stack(d_gpu.tensor(), kNumGroups), options);
  const Matrix<float> result = d_gpu.download();
  grouped_wgrad_bf16(a.host.tensor(), b.host.tensor(), Ints::vector(offsets.host.tensor()),
                     stack(d.tensor(), kNumGroups), options);
  ASSERT_TRUE(result.same_bytes(d));
  check_groups({DeviceType::cuda, 0});
}

template <class T>
void check(const GemmConfig& config, std::mt19937& rng) {
  if (config.grouping == Grouping::rows) {
    for (const GroupsBy by : {GroupsBy::offsets, GroupsBy::row_groups, GroupsBy::counts})
      check_rows<T>(config, by, rng);
    return;
  }
  // Ragged in each dimension; more k-blocks than any pipeline has stages; several tiles of several CTAs.
  constexpr int kShapes[][3] = {{1, 1, 1}, {3, 40, 100}, {130, 200, 1000}, {300, 456, 1700}, {515, 129, 300}};
  for (const auto& [m, n, k] : kShapes) {
    for (const bool with_c : {false, true}) {
      SCOPED_TRACE(::testing::Message() << m << "x" << n << "x" << k << (with_c ? " with C" : ""));
      check_dense<T>(config, m, n, k, with_c, rng);
    }
  }
}

TEST_F(OnGpu, EveryBf16KernelGivesTheBitsOfTheCpu) {
  std::mt19937 rng(kSeed);
  for (const GemmConfig& config : plan::all_bf16_configs()) {
    SCOPED_TRACE(jit::gemm_source(config).name);
    if (config.grouping == Grouping::columns)
      for (const bool accumulate : {false, true}) check_columns(config, accumulate, rng);
    else
      config.out == OutType::bf16 ? check<Bf16>(config, rng) : check<float>(config, rng);
  }
}

// An expert's NaN stays its own, though the last k-block of one group reaches into the next.
TEST_F(OnGpu, NeighboursDoNotMeet) {
  std::mt19937 rng(kSeed);
  setenv("PHALANX_GEMM_CONFIG", "", 1);
  constexpr int kSize = 70, kTokens = 200;
  Integers a(kTokens, kSize, Major::k, rng);
  for (int i = 75; i < 131; ++i)
    for (int j = 0; j < kSize; ++j) a.host.at(i, j) = {0x7fff};
  DeviceCopy<Bf16> tokens(a.host);
  Ints offsets({0, 75, 131, 200});
  Matrix<float> d(3 * kSize, kSize);
  DeviceCopy d_gpu(d);
  grouped_wgrad_bf16(tokens.tensor(), tokens.tensor(), Ints::vector(offsets.gpu.tensor()), stack(d_gpu.tensor(), 3));
  const Matrix<float> gradient = d_gpu.download();
  for (int i = 0; i < 3 * kSize; ++i)
    for (int j = 0; j < kSize; ++j) ASSERT_EQ(std::isnan(gradient.at(i, j)), i / kSize == 1) << i << ", " << j;

  // B [G, N, K], contiguous along N: expert 1 of three is NaN.
  Matrix<Bf16> b(3 * kSize, kSize), x(30, kSize), y(30, kSize);
  b.fill([&](auto i, auto) { return Bf16{std::uint16_t(i / kSize == 1 ? 0x7fff : 0x3f80)}; });
  x.fill([](auto, auto) { return Bf16{0x3f80}; });
  DeviceCopy b_gpu(b), x_gpu(x), y_gpu(y);
  const std::int64_t line = b.tensor().strides[0];
  const Tensor& t = b_gpu.tensor();
  const Tensor experts{t.data, t.dtype, t.device, 3, {3, kSize, kSize}, {kSize * line, 1, line}};
  Ints rows({0, 10, 20, 30});
  grouped_gemm_bf16(x_gpu.tensor(), experts, Ints::vector(rows.gpu.tensor()), y_gpu.tensor());
  const Matrix<Bf16> product = y_gpu.download();
  for (int i = 0; i < 30; ++i)
    for (int j = 0; j < kSize; ++j) {
      if (i / 10 == 1)
        ASSERT_TRUE(std::isnan(product.value(i, j)));
      else
        ASSERT_EQ(product.value(i, j), kSize);
    }
}

}  // namespace
}  // namespace phalanx::test
