// The planner of grouped products: every plan is one of the enumerated, valid kernels, and has the CTAs for its tiles.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <string>

#include "jit/kernels.h"
#include "plan/grouped.h"
#include "tests/cpu/golden.h"

namespace phalanx {
namespace {

TEST(GroupedPlan, ConfigsAreValidAndDistinct) {
  std::set<std::string> names;
  for (const GemmConfig& c : plan::all_grouped_configs()) {
    EXPECT_TRUE(is_valid(c)) << jit::gemm_source(c).name;
    EXPECT_TRUE(c.grouped());
    EXPECT_EQ(c.split_k, 1) << "a row's bits may not depend on the others";
    EXPECT_LE(c.scales_a_box(), 256) << "the most that TMA copies of a row";
    EXPECT_EQ(smem_layout(c).sfa % 128, 0) << "as TMA wants";
    EXPECT_EQ(smem_layout(c).sfb % 128, 0);
    EXPECT_EQ(smem_layout(c).parts % 16, 0) << "as WGMMA wants";
    EXPECT_EQ(smem_layout(c).groups % int(alignof(GroupEntry)), 0);
    EXPECT_EQ(smem_layout(c).full % 8, 0);
    EXPECT_TRUE(names.insert(jit::gemm_source(c).name).second) << "twice: " << jit::gemm_source(c).name;
  }
  EXPECT_LE(names.size(), 60u);
}

TEST(GroupedPlan, ReturnsOnlyEnumeratedConfigs) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  const auto& all = plan::all_grouped_configs();
  for (int i = 0; i < 20000; ++i) {
    const auto size = [&] { return 1 + int(std::exp(std::uniform_real_distribution(0.0, 10.0)(rng))); };
    const bool rows = rng() % 2;
    const plan::GroupedProblem problem{.grouping = rows ? Grouping::rows : Grouping::columns,
                                       .num_groups = int(1 + rng() % 512),
                                       .m = size(),
                                       .n = size(),
                                       .k = size(),
                                       .expected_rows = rng() % 2 ? 0 : size(),
                                       .out = !rows ? OutType::f32 : OutType(rng() % 3),
                                       .all_sms = rng() % 2 == 0};
    const int num_sms = std::max(int(1 + rng() % 132), problem.out == OutType::swiglu ? 2 : 1);
    const plan::GemmPlan p = plan::plan_grouped(problem, num_sms);
    ASSERT_NE(std::find(all.begin(), all.end(), p.config), all.end());
    ASSERT_EQ(p.config.grouping, problem.grouping);
    ASSERT_EQ(p.config.out, problem.out);
    ASSERT_GE(p.num_ctas, p.config.cluster_size());
    ASSERT_LE(p.num_ctas, num_sms);
    ASSERT_EQ(p.num_ctas % p.config.cluster_size(), 0);
    ASSERT_EQ(p, plan::plan_grouped(problem, num_sms)) << "a pure function";
    if (const int cluster = p.config.cluster_size();
        !problem.all_sms && cluster > 1 && problem.out != OutType::swiglu) {
      ASSERT_LE(p.num_ctas + 8 * (cluster - 1), num_sms) << "a GPC's last SMs may be others'";
    }
  }
}

TEST(GroupedPlan, WeightsLeaveL2FirstWhereEachIsReadOnceAndAllAreNotTooMany) {
  const auto leave = [](int groups, int rows, int n, int k, int expected = 0, int block_m = 128) {
    return plan::weights_leave_l2_first({.block_m = block_m, .grouping = Grouping::rows},
                                        {Grouping::rows, groups, rows, n, k, expected, OutType::bf16});
  };
  EXPECT_TRUE(leave(16, 16 * 67, 1536, 2048));
  EXPECT_TRUE(leave(16, 16 * 500, 1536, 2048, 64)) << "the caller knows better";
  EXPECT_FALSE(leave(16, 16 * 500, 1536, 2048)) << "more than a tile each";
  EXPECT_FALSE(leave(16, 16 * 67, 1536, 2048, 0, 64)) << "many of the groups";
  EXPECT_FALSE(leave(16, 16 * 67, 1536, 2048, 0, 192)) << "never timed";
  EXPECT_FALSE(leave(16, 16 * 67, 256, 512)) << "2 MB";
  EXPECT_FALSE(leave(32, 32 * 4, 7168, 2048)) << "470 MB";
  EXPECT_TRUE(leave(32, 3, 4096, 7168, 0, 64)) << "of which three groups at most have rows";
}

std::string table_of_choices() {
  std::string table = "# grouping groups M N K expected out: kernel, CTAs\n";
  const auto add = [&](plan::GroupedProblem p) {
    p.all_sms = true;
    const plan::GemmPlan plan = plan::plan_grouped(p, 132);
    table += fmt::format("{} {} {} {} {} {} {}: {}, {}\n", p.grouping == Grouping::rows ? "rows" : "columns",
                         p.num_groups, p.m, p.n, p.k, p.expected_rows,
                         p.out == OutType::bf16             ? "bf16"
                         : p.out == OutType::f32            ? "f32"
                         : plan::swiglu_in_epilogue(p, 132) ? "swiglu"
                                                            : "swiglu (two kernels if there is room)",
                         jit::gemm_source(plan.config).name, plan.num_ctas);
  };
  for (const auto& [n, k] :
       {std::pair{4096, 7168}, {7168, 2048}, {3072, 4096}, {4096, 1536}, {1536, 2048}, {2048, 768}})
    for (const OutType out : {OutType::bf16, OutType::f32, OutType::swiglu}) {
      if (out == OutType::swiglu && n > k) continue;  // no gates and ups
      for (const auto& [groups, rows] : {std::pair{8, 4096},
                                         {4, 8192},
                                         {32, 2048},
                                         {32, 512},
                                         {32, 256},
                                         {32, 128},
                                         {32, 16},
                                         {128, 1},
                                         {1, 1024},
                                         {2, 512},
                                         {4, 256}})
        add({Grouping::rows, groups, groups * rows, n, k, 0, out});
      for (const int expected : {1, 16, 64, 100, 128, 256, 1000})
        add({Grouping::rows, 32, 32 * 4096, n, k, expected, out});
    }
  for (const auto& [m, n] : {std::pair{4096, 7168}, {7168, 2048}})
    for (const auto& [groups, tokens] : {std::pair{1, 8192}, {4, 8192}, {8, 4096}})
      add({Grouping::columns, groups, m, n, groups * tokens, 0, OutType::f32});
  return table;
}

TEST(GroupedPlan, ChoosesWhatTheGoldenTableSays) { test::check_golden("grouped_plans.txt", table_of_choices()); }

}  // namespace
}  // namespace phalanx
