// Every kernel of the grouped products and of the weight gradients, on groups that begin anywhere: the CPU's bits, and
// poison all around. Short enough to run under each tool of compute-sanitizer. Operands are small integers with
// power-of-two scales: every sum is exact in every order.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "jit/kernels.h"
#include "phalanx/phalanx.h"
#include "plan/grouped.h"
#include "plan/tuned.h"
#include "tests/cpu/matrix.h"
#include "tests/gpu/groups.h"
#include "tests/gpu/on_gpu.h"

namespace phalanx::test {
namespace {

// The process tunes: the operations read the variable at each call.
const bool kTuning = setenv("PHALANX_GEMM_CONFIG", "", 1) == 0;

void force(const GemmConfig& config) {
  setenv("PHALANX_GEMM_CONFIG", plan::format_plan({.config = config, .num_ctas = 0, .group_m = 8}).c_str(), 1);
}

template <class T>
void check_rows(const GemmConfig& config, GroupsBy by, Order sfa_order, std::mt19937& rng, int n = 200, int k = 400) {
  const int k_blocks = (k + 127) / 128;
  const bool masked = by == GroupsBy::counts;
  const int rows = masked ? kNumGroups * kGroups.max_rows : int(kGroups.row_groups.size());
  const auto integer = [&](auto, auto) { return cpu::E4m3{std::uint8_t(nearest_e4m3(int(rng() % 5) - 2))}; };
  const auto power = [&](auto, auto) { return rng() % 2 ? 1.0f : 0.5f; };
  Matrix<cpu::E4m3> a(rows, k, 1), b(kNumGroups * n, k, 1);
  Matrix<float> sfa(rows, k_blocks, 0, sfa_order), sfb(kNumGroups * ((n + 127) / 128), k_blocks);
  Matrix<T> d(rows, n, 2);
  a.fill(integer), b.fill(integer), sfa.fill(power), sfb.fill(power);
  DeviceCopy a_gpu(a), b_gpu(b);
  DeviceCopy sfa_gpu(sfa), sfb_gpu(sfb);
  DeviceCopy d_gpu(d);
  Ints groups(kGroups.by(by));

  const auto run = [&](Tensor a_, Tensor sfa_, Tensor b_, Tensor sfb_, Tensor groups_, Tensor d_) {
    const ScaledTensor experts{stack(b_, kNumGroups), stack(sfb_, kNumGroups)};
    groups_ = Ints::vector(groups_);
    if (by == GroupsBy::offsets)
      grouped_gemm_fp8({a_, sfa_}, experts, groups_, d_);
    else if (by == GroupsBy::row_groups)
      grouped_gemm_fp8_indexed({a_, sfa_}, experts, groups_, d_);
    else
      grouped_gemm_fp8_masked({stack(a_, kNumGroups), stack(sfa_, kNumGroups)}, experts, groups_,
                              stack(d_, kNumGroups));
  };
  force(config);
  run(a_gpu.tensor(), sfa_gpu.tensor(), b_gpu.tensor(), sfb_gpu.tensor(), groups.gpu.tensor(), d_gpu.tensor());
  const Matrix<T> result = d_gpu.download();
  run(a.tensor(), sfa.tensor(), b.tensor(), sfb.tensor(), groups.host.tensor(), d.tensor());
  ASSERT_TRUE(result.same_bytes(d)) << "the bits of the CPU's result, and poison in rows of no group";
  check_groups({DeviceType::cuda, 0});
}

// Against the two kernels, which other tests hold to the CPU.
void check_swiglu(const GemmConfig& config, Order sfa_order, bool weighted, float limit, std::mt19937& rng) {
  constexpr int kI = 256, kN = 2 * kI, kK = 1000, kKBlocks = 8;
  const int rows = int(kGroups.row_groups.size()) + 5, first = kGroups.offsets.front(), end = kGroups.offsets.back();
  const auto bits = [&](auto, auto) { return cpu::E4m3{std::uint8_t(rng() % 97 == 0 ? 0x7f : rng() % 0x7e)}; };
  const auto few = [&](auto, auto) { return cpu::E4m3{std::uint8_t(rng() % 0xfe & 0xbf)}; };
  const auto scale = [&](int exponent) { return std::ldexp(1.0f, exponent) * float(1 + rng() % 99); };
  Matrix<cpu::E4m3> a(rows, kK, 1), b(kNumGroups * kN, kK, 1), q(rows, kI, 1), expected = q;
  Matrix<float> sfa(rows, kKBlocks, 0, sfa_order), sfb(kNumGroups * kN / 128, kKBlocks), weights(1, rows);
  Matrix<float> scales(rows, kI / 128, 0, Order::col_major), expected_scales = scales;
  Matrix<cpu::Bf16> x(rows, kN, 1);
  a.fill([&](auto i, auto j) { return i % 31 == 7 ? bits(i, j) : few(i, j); }), b.fill(few);
  // Gates of most rows are around 1; some overflow BF16, or FP32 with their ups.
  sfa.fill([&](auto i, auto) { return scale(i % 17 == 4 ? 100 : i % 19 == 5 ? 40 : -9); });
  sfb.fill([&](auto, auto) { return scale(-7); });
  weights.fill([&](auto, auto) { return 0.125f * float(rng() % 16) - 0.5f; });
  DeviceCopy a_gpu(a), b_gpu(b), q_gpu(q), expected_gpu(expected);
  DeviceCopy sfa_gpu(sfa), sfb_gpu(sfb), scales_gpu(scales), expected_scales_gpu(expected_scales), weights_gpu(weights);
  DeviceCopy x_gpu(x);
  Ints offsets(kGroups.offsets);

  const ScaledTensor in{a_gpu.tensor(), sfa_gpu.tensor()};
  const ScaledTensor experts{stack(b_gpu.tensor(), kNumGroups), stack(sfb_gpu.tensor(), kNumGroups)};
  const Tensor of_groups = Ints::vector(offsets.gpu.tensor());
  Tensor of_rows = weights_gpu.tensor();
  of_rows.ndim = 1, of_rows.shape[0] = rows, of_rows.strides[0] = 1;
  GroupedSwigluOptions options{.limit = limit, .pow2_scales = weighted};
  if (weighted) options.weights = of_rows;
  force(config);
  grouped_gemm_fp8_swiglu(in, experts, of_groups, {q_gpu.tensor(), scales_gpu.tensor()}, options);

  setenv("PHALANX_GEMM_CONFIG", "", 1);
  grouped_gemm_fp8(in, experts, of_groups, x_gpu.tensor());
  const auto rows_of = [&](Tensor t, std::int64_t row_bytes) {
    t.data = static_cast<char*>(t.data) + first * row_bytes;
    t.shape[0] = end - first;
    return t;
  };
  const Tensor q_rows = expected_gpu.tensor(), s_rows = expected_scales_gpu.tensor(), x_rows = x_gpu.tensor();
  SwigluOptions swiglu{.limit = limit, .pow2_scales = weighted};
  if (weighted) swiglu.weights = rows_of(of_rows, 4);
  swiglu_quantize(rows_of(x_rows, x_rows.strides[0] * 2),
                  {rows_of(q_rows, q_rows.strides[0]), rows_of(s_rows, s_rows.strides[0] * 4)}, swiglu);
  ASSERT_TRUE(scales_gpu.download().same_bytes(expected_scales_gpu.download()));
  ASSERT_TRUE(q_gpu.download().same_bytes(expected_gpu.download()))
      << "the bits of both kernels, and poison in rows of no group";
  check_groups({DeviceType::cuda, 0});
}

void check_columns(const GemmConfig& config, bool accumulate, Order order, std::mt19937& rng) {
  constexpr int kM = 150, kN = 200;
  const int k = kGroups.offsets.back() + 20;
  const auto integer = [&](auto, auto) { return cpu::E4m3{std::uint8_t(nearest_e4m3(int(rng() % 5) - 2))}; };
  const auto power = [&](auto, auto) { return rng() % 2 ? 1.0f : 0.5f; };
  Matrix<cpu::E4m3> a(kM, k, 1), b(kN, k, 1);
  Matrix<float> sfa(kM, (k + 127) / 128, 0, order), sfb(kN, (k + 127) / 128, 0, order), d(kNumGroups * kM, kN, 1);
  a.fill(integer), b.fill(integer), sfa.fill(power), sfb.fill(power);
  if (accumulate) d.fill([&](auto, auto) { return float(rng() % 9); });
  DeviceCopy a_gpu(a), b_gpu(b);
  DeviceCopy sfa_gpu(sfa), sfb_gpu(sfb), d_gpu(d);
  Ints offsets(kGroups.offsets);

  const WgradOptions options{.accumulate = accumulate};
  force(config);
  grouped_wgrad_fp8({a_gpu.tensor(), sfa_gpu.tensor()}, {b_gpu.tensor(), sfb_gpu.tensor()},
                    Ints::vector(offsets.gpu.tensor()), stack(d_gpu.tensor(), kNumGroups), options);
  const Matrix<float> result = d_gpu.download();
  grouped_wgrad_fp8({a.tensor(), sfa.tensor()}, {b.tensor(), sfb.tensor()}, Ints::vector(offsets.host.tensor()),
                    stack(d.tensor(), kNumGroups), options);
  ASSERT_TRUE(result.same_bytes(d));
  check_groups({DeviceType::cuda, 0});
}

TEST_F(OnGpu, EveryGroupedKernelGivesTheBitsOfTheCpu) {
  std::mt19937 rng(kSeed);
  for (const GemmConfig& config : plan::all_grouped_configs()) {
    if (config.gates_and_ups()) continue;
    for (const Order order : {Order::col_major, Order::row_major}) {  // scales by TMA, by threads
      SCOPED_TRACE(::testing::Message() << jit::gemm_source(config).name << (order == Order::row_major ? " rows" : ""));
      if (config.grouping == Grouping::columns) {
        for (const bool accumulate : {false, true}) check_columns(config, accumulate, order, rng);
      } else {
        for (const GroupsBy by : {GroupsBy::offsets, GroupsBy::row_groups, GroupsBy::counts})
          config.out == OutType::bf16 ? check_rows<cpu::Bf16>(config, by, order, rng)
                                      : check_rows<float>(config, by, order, rng);
      }
      if (HasFatalFailure()) return;
    }
  }
}

// Weights so large, and rows so few, that the weights leave L2 first.
TEST_F(OnGpu, GroupedProductsOfLargeWeightsGiveTheBitsOfTheCpu) {
  std::mt19937 rng(kSeed);
  for (const GemmConfig& config : plan::all_grouped_configs()) {
    if (config.grouping != Grouping::rows || config.gates_and_ups() || config.block_m != 128) continue;
    SCOPED_TRACE(jit::gemm_source(config).name);
    if (config.out == OutType::bf16)
      check_rows<cpu::Bf16>(config, GroupsBy::offsets, Order::col_major, rng, 1480, 1000);
    else
      check_rows<float>(config, GroupsBy::row_groups, Order::row_major, rng, 1480, 1000);
    if (HasFatalFailure()) return;
  }
}

TEST_F(OnGpu, EveryKernelWithSwigluGivesTheBitsOfTwo) {
  constexpr float kNoLimit = std::numeric_limits<float>::infinity();
  std::mt19937 rng(kSeed);
  for (const GemmConfig& config : plan::all_grouped_configs()) {
    if (!config.gates_and_ups()) continue;
    SCOPED_TRACE(jit::gemm_source(config).name);
    check_swiglu(config, Order::col_major, false, kNoLimit, rng);
    check_swiglu(config, Order::row_major, true, 7, rng);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace phalanx::test
