// The planner: every plan is one of the enumerated, valid kernels, and a developer's override means what it says.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <string>

#include "jit/kernels.h"
#include "plan/plan.h"
#include "tests/cpu/golden.h"

namespace phalanx {
namespace {

TEST(Plan, ConfigsAreValidAndDistinct) {
  std::set<std::string> names;
  for (const GemmConfig& c : plan::all_gemm_configs()) {
    EXPECT_TRUE(is_valid(c)) << jit::gemm_source(c).name;
    EXPECT_LE(smem_layout(c).total, kMaxSmemBytes);
    EXPECT_TRUE(names.insert(jit::gemm_source(c).name).second) << "twice: " << jit::gemm_source(c).name;
  }
  EXPECT_LE(names.size(), 60u);
}

TEST(Plan, NonsenseIsNoValidConfig) {
  for (const int none : {0, -1}) {
    EXPECT_FALSE(is_valid({.num_consumers = none, .out = OutType::f32, .grouping = Grouping::columns}));
    EXPECT_FALSE(is_valid({.num_consumers = none, .out = OutType::swiglu, .grouping = Grouping::rows}));
    EXPECT_FALSE(is_valid({.cluster_n = none}));
    EXPECT_FALSE(is_valid({.cluster_m = none}));
    EXPECT_FALSE(is_valid({.split_k = none}));
    EXPECT_FALSE(is_valid({.num_stages = none}));
  }
  EXPECT_FALSE(is_valid({.num_stages = 1 << 29}));  // bytes of shared memory that do not fit 32 bits
}

TEST(Plan, ReturnsOnlyEnumeratedConfigs) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  const auto& all = plan::all_gemm_configs();
  for (int i = 0; i < 20000; ++i) {
    const auto size = [&] { return 1 + int(std::exp(std::uniform_real_distribution(0.0, 10.0)(rng))); };
    const plan::GemmProblem problem{
        size(),         size(),         size(),        rng() % 2 ? OutType::bf16 : OutType::f32,
        rng() % 4 == 0, rng() % 2 == 0, rng() % 2 == 0};
    const int num_sms = 1 + rng() % 132;
    const plan::GemmPlan p = plan::plan_gemm(problem, num_sms);
    ASSERT_NE(std::find(all.begin(), all.end(), p.config), all.end());
    ASSERT_EQ(p, plan::plan_gemm(problem, num_sms)) << "a pure function";
    if (const int cluster = p.config.cluster_size(); !problem.all_sms && p.config.split_k == 1 && cluster > 1) {
      ASSERT_LE(p.num_ctas + 8 * (cluster - 1), num_sms) << "a GPC's last SMs may be others'";
    }
  }
}

std::string table_of_choices() {
  constexpr std::pair<int, int> kLayers[] = {{2112, 7168}, {24576, 1536}, {32768, 512}, {7168, 16384},
                                             {4096, 7168}, {7168, 2048},  {8192, 8192}, {576, 7168},
                                             {9216, 4096}, {4096, 8192},  {576, 512},   {2112, 768}};
  std::string table = "# M N K out SMs, with constant_b if that makes a difference: kernel, CTAs\n";
  constexpr int kAllSms = 132;
  for (const auto& [out, num_sms] : {std::pair{OutType::bf16, kAllSms}, {OutType::bf16, 108}, {OutType::f32, kAllSms}})
    for (const int m : {1, 9, 16, 17, 64, 65, 128, 129, 256, 512, 1024, 4096})
      for (const auto& [n, k] : kLayers)
        for (const bool constant_b : {false, true}) {
          const plan::GemmProblem problem{
              .m = m, .n = n, .k = k, .out = out, .all_sms = num_sms == kAllSms, .constant_b = constant_b};
          const plan::GemmPlan p = plan::plan_gemm(problem, num_sms);
          plan::GemmProblem otherwise = problem;
          otherwise.constant_b = false;
          if (constant_b && p == plan::plan_gemm(otherwise, num_sms)) continue;
          table += fmt::format("{} {} {} {} {}{}: {}, {}\n", m, n, k, out == OutType::bf16 ? "bf16" : "f32", num_sms,
                               constant_b ? " constant_b" : "", jit::gemm_source(p.config).name, p.num_ctas);
        }
  return table;
}

TEST(Plan, ChoosesWhatTheGoldenTableSays) { test::check_golden("plans.txt", table_of_choices()); }

TEST(Plan, ParsesOverrides) {
  const plan::GemmProblem problem{4096, 4096, 4096, OutType::bf16};
  const auto p = plan::parse_plan("block_m=256,block_n=128,num_stages=3,cluster_n=2,group_m=16", problem, 132);
  ASSERT_TRUE(p);
  EXPECT_EQ(p->config, (GemmConfig{.block_m = 256, .block_n = 128, .num_stages = 3, .cluster_n = 2}));
  EXPECT_EQ(p->group_m, 16);
  EXPECT_EQ(p->num_ctas, 132);
  for (const char* bad :
       {"block_m", "block_q=3", "block_m=", "block_m=12x", "block_m=100", "num_stages=40", "group_m=0", "group_m=3"})
    EXPECT_FALSE(plan::parse_plan(bad, problem, 132)) << bad;
}

}  // namespace
}  // namespace phalanx
