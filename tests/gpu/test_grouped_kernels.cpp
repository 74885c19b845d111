// Every kernel of the grouped products and of the weight gradients, on groups that begin anywhere: the CPU's bits, and poison
// all around. Short enough to run under each tool of compute-sanitizer. Operands are small integers with power-of-two
// scales: every sum is exact in every order.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
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
void check_rows(const GemmConfig& config, GroupsBy by, Order sfa_order, std::mt19937& rng) {
  constexpr int kN = 200, kK = 400, kKBlocks = 4;
  const bool masked = by == GroupsBy::counts;
  const int rows = masked ? kNumGroups * kGroups.max_rows : int(kGroups.row_groups.size());
  const auto integer = [&](auto, auto) { return cpu::E4m3{std::uint8_t(nearest_e4m3(int(rng() % 5) - 2))}; };
  const auto power = [&](auto, auto) { return rng() % 2 ? 1.0f : 0.5f; };
  Matrix<cpu::E4m3> a(rows, kK, 1), b(kNumGroups * kN, kK, 1);
  Matrix<float> sfa(rows, kKBlocks, 0, sfa_order), sfb(kNumGroups * 2, kKBlocks);
  Matrix<T> d(rows, kN, 2);
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
    for (const Order order : {Order::col_major, Order::row_major}) {  // scales by TMA, by cp.async
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

}  // namespace
}  // namespace phalanx::test
