// The planner of BF16 products: every plan is one of the enumerated, valid kernels, and has the CTAs for its tiles.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <string>

#include "jit/kernels.h"
#include "plan/bf16.h"
#include "tests/cpu/golden.h"

namespace phalanx {
namespace {

plan::Bf16Problem dense(int m, int n, int k, OutType out, Major a, Major b) {
  return {{Grouping::none, 1, m, n, k, 0, out}, a, b};
}

TEST(Bf16Plan, ConfigsAreValidAndDistinct) {
  std::set<std::string> names;
  for (const GemmConfig& c : plan::all_bf16_configs()) {
    EXPECT_TRUE(is_valid(c)) << jit::gemm_source(c).name;
    EXPECT_EQ(c.operand, Operand::bf16);
    EXPECT_TRUE(c.split_k == 1 || !c.grouped()) << "a row's bits may not depend on the others";
    EXPECT_EQ(smem_layout(c).groups % int(alignof(GroupEntry)), 0);
    EXPECT_EQ(smem_layout(c).full % 8, 0);
    EXPECT_TRUE(names.insert(jit::gemm_source(c).name).second) << "twice: " << jit::gemm_source(c).name;
  }
  EXPECT_LE(names.size(), 24u);
}

TEST(Bf16Plan, ReturnsOnlyEnumeratedConfigs) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  const auto& all = plan::all_bf16_configs();
  for (int i = 0; i < 20000; ++i) {
    const auto size = [&] { return 1 + int(std::exp(std::uniform_real_distribution(0.0, 10.0)(rng))); };
    const auto major = [&] { return rng() % 2 ? Major::k : Major::mn; };
    plan::Bf16Problem problem =
        dense(size(), size(), size(), rng() % 2 ? OutType::bf16 : OutType::f32, major(), major());
    problem.batch_invariant = rng() % 2;
    if (const auto grouping = Grouping(rng() % 3); grouping != Grouping::none) {
      problem.shape.grouping = grouping;
      problem.shape.num_groups = int(1 + rng() % 512);
      problem.shape.expected_rows = rng() % 2 ? 0 : size();
      if (grouping == Grouping::rows) problem.major_a = Major::k;
      if (grouping == Grouping::columns)
        problem.major_a = problem.major_b = Major::mn, problem.shape.out = OutType::f32;
    }
    const int num_sms = 1 + rng() % 132;
    const plan::GemmPlan p = plan::plan_bf16(problem, num_sms);
    ASSERT_NE(std::find(all.begin(), all.end(), p.config), all.end());
    ASSERT_EQ(p.config.grouping, problem.shape.grouping);
    ASSERT_EQ(p.config.out, problem.shape.out);
    ASSERT_EQ(p.config.major_a, problem.major_a);
    ASSERT_EQ(p.config.major_b, problem.major_b);
    ASSERT_TRUE(p.config.split_k == 1 || !problem.batch_invariant);
    ASSERT_GE(p.num_ctas, p.config.cluster_size());
    ASSERT_LE(p.num_ctas, num_sms);
    ASSERT_EQ(p.num_ctas % p.config.cluster_size(), 0);
    ASSERT_EQ(p, plan::plan_bf16(problem, num_sms)) << "a pure function";
  }
}

std::string table_of_choices() {
  std::string table = "# grouping groups M N K out: kernel, CTAs\n";
  const auto add = [&](const plan::Bf16Problem& problem) {
    constexpr const char* kGroupings[] = {"none", "rows", "columns"};
    const plan::GemmPlan plan = plan::plan_bf16(problem, 132);
    const plan::GroupedProblem& p = problem.shape;
    table += fmt::format("{} {} {} {} {} {}: {}, {}\n", kGroupings[int(p.grouping)], p.num_groups, p.m, p.n, p.k,
                         p.out == OutType::bf16 ? "bf16" : "f32", jit::gemm_source(plan.config).name, plan.num_ctas);
  };
  constexpr std::pair<int, int> kLayers[] = {{2112, 7168},  {24576, 1536}, {32768, 512},
                                             {7168, 16384}, {4096, 7168},  {7168, 2048}};
  for (const auto& [out, b] :
       {std::pair{OutType::bf16, Major::k}, {OutType::f32, Major::k}, {OutType::bf16, Major::mn}})
    for (const int m : {1, 64, 128, 256, 1024, 4096})
      for (const auto& [n, k] : kLayers) add(dense(m, n, k, out, Major::k, b));
  for (const auto& [n, k] : {std::pair{4096, 7168}, {7168, 2048}}) {
    for (const int rows : {1, 16, 64, 128, 256, 4096})
      add({{Grouping::rows, 8, 8 * rows, n, k, 0, OutType::bf16}, Major::k, Major::k});
    add({{Grouping::columns, 8, k, n, 8 * 4096, 0, OutType::f32}, Major::mn, Major::mn});
  }
  return table;
}

TEST(Bf16Plan, ChoosesWhatTheGoldenTableSays) { test::check_golden("bf16_plans.txt", table_of_choices()); }

TEST(Bf16Plan, ParsesOverrides) {
  const plan::Bf16Problem problem = dense(4096, 4096, 4096, OutType::bf16, Major::k, Major::mn);
  const auto p = plan::parse_bf16_plan("block_m=128,block_n=256,num_stages=3,cluster_m=2", problem, 132);
  ASSERT_TRUE(p);
  EXPECT_EQ(p->config.operand, Operand::bf16);
  EXPECT_EQ(p->config.major_b, Major::mn);
  EXPECT_FALSE(plan::parse_bf16_plan("block_m=128,block_n=32", problem, 132)) << "less than a panel";
}

}  // namespace
}  // namespace phalanx
