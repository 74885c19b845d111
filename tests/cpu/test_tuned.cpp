// Measured plans: what is kept is found again, for that product alone; and what plans may not do, measured or not.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>

#include "jit/jit.h"
#include "jit/kernels.h"
#include "plan/tuned.h"

namespace phalanx::plan {
namespace {

constexpr GemmProblem kProblem{64, 7168, 2048, OutType::bf16};

TunedGemm entry_for(const GemmProblem& problem, const GemmConfig& config, int num_sms = 132) {
  return {"NVIDIA H200", problem, num_sms, format_plan(plan_with(config, 8, problem, num_sms)), 10, 11};
}

// A kernel that the planner would not choose.
GemmConfig other_config(const GemmProblem& problem) {
  const GemmConfig planned = plan_gemm(problem, 132).config;
  for (const GemmConfig& config : all_gemm_configs())
    if (config.out == problem.out && !(config == planned)) return config;
  return planned;
}

TEST(Tuned, EveryPlanSurvivesItsText) {
  for (const GemmConfig& config : all_gemm_configs()) {
    const GemmProblem problem{config.few_rows() ? 5 : 700, 2112, 7168, config.out};
    const GemmPlan plan = plan_with(config, 16, problem, 132);
    EXPECT_EQ(parse_plan(format_plan(plan), problem, 132), plan) << jit::gemm_source(config).name;
  }
}

TEST(Tuned, FindsExactlyWhatWasMeasured) {
  TunedGemms tuned;
  const GemmConfig config = other_config(kProblem);
  tuned.put(entry_for(kProblem, config));
  const TunedGemms read = TunedGemms::from_json(tuned.to_json());
  const auto plan = read.find("NVIDIA H200", kProblem, 132);
  ASSERT_TRUE(plan);
  EXPECT_EQ(*plan, plan_with(config, 8, kProblem, 132));

  EXPECT_FALSE(read.find("NVIDIA H100", kProblem, 132));
  EXPECT_FALSE(read.find("NVIDIA H200", kProblem, 131));
  for (const GemmProblem& other : {GemmProblem{65, 7168, 2048, OutType::bf16},
                                   {64, 7169, 2048, OutType::bf16},
                                   {64, 7168, 2049, OutType::bf16},
                                   {64, 7168, 2048, OutType::f32},
                                   {64, 7168, 2048, OutType::bf16, true}})
    EXPECT_FALSE(read.find("NVIDIA H200", other, 132));
}

TEST(Tuned, ConstantWeightsKeepTheKernelThatReadsThemEarly) {
  const GemmProblem alone{.m = 5, .n = 7168, .k = 2048, .out = OutType::bf16, .all_sms = true};
  GemmProblem in_chain = alone, many_rows = kProblem;
  in_chain.constant_b = many_rows.constant_b = true;
  const GemmConfig few = plan_gemm(in_chain, 132).config;
  ASSERT_TRUE(few.few_rows());
  const GemmConfig tile = plan_gemm(kProblem, 132).config;

  TunedGemms tuned;
  tuned.put(entry_for(alone, tile));
  EXPECT_EQ(tuned.find("NVIDIA H200", alone, 132)->config, tile);
  EXPECT_FALSE(tuned.find("NVIDIA H200", in_chain, 132));
  tuned.put(entry_for(alone, few));
  EXPECT_EQ(tuned.find("NVIDIA H200", in_chain, 132)->config, few);
  tuned.put(entry_for(kProblem, other_config(kProblem)));
  EXPECT_EQ(tuned.find("NVIDIA H200", many_rows, 132)->config, other_config(kProblem));
}

TEST(Tuned, ALaterMeasurementReplacesAnEarlierOne) {
  TunedGemms tuned;
  tuned.put(entry_for(kProblem, plan_gemm(kProblem, 132).config));
  tuned.put(entry_for(kProblem, other_config(kProblem)));
  ASSERT_EQ(tuned.entries().size(), 1u);
  EXPECT_EQ(tuned.find("NVIDIA H200", kProblem, 132)->config, other_config(kProblem));
  tuned.erase("NVIDIA H200", kProblem, 132);
  EXPECT_TRUE(tuned.entries().empty());
}

TEST(Tuned, DoesNotBringBackClustersThatMayWait) {
  const GemmProblem alone{.m = 4096, .n = 4096, .k = 7168, .out = OutType::bf16, .all_sms = true};
  GemmProblem beside_others = alone;
  beside_others.all_sms = false;
  const auto& all = all_gemm_configs();
  const auto pairs = std::find_if(all.begin(), all.end(), [](const GemmConfig& c) {
    return c.out == OutType::bf16 && c.block_m == 256 && c.cluster_n == 2;
  });
  ASSERT_NE(pairs, all.end());
  TunedGemms tuned;
  tuned.put(entry_for(alone, *pairs));
  EXPECT_TRUE(tuned.find("NVIDIA H200", alone, 132));
  EXPECT_FALSE(tuned.find("NVIDIA H200", beside_others, 132));
  const auto has_pairs = [&](const GemmProblem& problem) {
    const auto plans = runnable_plans(problem, 132);
    return std::any_of(plans.begin(), plans.end(), [&](const GemmPlan& plan) { return plan.config == *pairs; });
  };
  EXPECT_TRUE(has_pairs(alone));
  EXPECT_FALSE(has_pairs(beside_others));
}

TEST(Tuned, PassesOverKernelsThatAreNoMore) {
  for (const char* config : {"block_m=128,block_n=128,num_stages=2", "block_m=100", "nonsense", ""}) {
    TunedGemms tuned;
    TunedGemm entry = entry_for(kProblem, other_config(kProblem));
    entry.config = config;
    tuned.put(entry);
    const auto plan = tuned.find("NVIDIA H200", kProblem, 132);
    if (!plan) continue;
    const auto& all = all_gemm_configs();
    EXPECT_NE(std::find(all.begin(), all.end(), plan->config), all.end()) << config;
  }
}

TEST(Tuned, RefusesTextsOfOthers) {
  for (const char* text : {"", "{", "[]", "{}", R"({"format": 2, "gemm_fp8": []})", R"({"format": 1})",
                           R"({"format": 1, "gemm_fp8": [{"m": 1}]})",
                           R"({"format": 1, "gemm_fp8": [{"gpu": "x", "num_sms": 1, "m": 1, "n": 1, "k": 1,
                              "out": "f64", "config": "", "us": 1, "planner_us": 1}]})"})
    EXPECT_THROW(TunedGemms::from_json(text), std::runtime_error) << text;
  EXPECT_TRUE(TunedGemms::from_json(TunedGemms{}.to_json()).entries().empty());
}

TEST(Tuned, LiesWhereTheVariablesSay) {
  const auto with = [](const char* variable, const char* value) {
    value ? setenv(variable, value, 1) : unsetenv(variable);
    return jit::tuned_path();
  };
  const char* const before = std::getenv("PHALANX_CACHE_DIR");
  const std::string cache = before ? before : "";
  with("PHALANX_CACHE_DIR", "/c");
  EXPECT_EQ(with("PHALANX_TUNED", nullptr), "/c/tuned.json");
  EXPECT_EQ(with("PHALANX_TUNED", "/t/mine.json"), "/t/mine.json");
  with("PHALANX_TUNED", nullptr);
  with("PHALANX_CACHE_DIR", cache.empty() ? nullptr : cache.c_str());
}

int random_size(std::mt19937& rng) { return 1 + int(std::exp(std::uniform_real_distribution(0.0, 10.0)(rng))); }

TEST(Plans, KeepToTheSmsThatTheyAreGiven) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  for (int i = 0; i < 5000; ++i) {
    const GemmProblem problem{random_size(rng), random_size(rng), random_size(rng),
                              OutType::bf16,    rng() % 2 == 0,   rng() % 2 == 0};
    const int num_sms = 1 + rng() % 132;
    const auto limit = [&](const GemmPlan& plan) { return num_sms * (problem.all_sms ? ctas_per_sm(plan.config) : 1); };
    const GemmPlan chosen = plan_gemm(problem, num_sms);
    EXPECT_LE(chosen.num_ctas, limit(chosen));
    for (const GemmPlan& plan : runnable_plans(problem, num_sms)) EXPECT_LE(plan.num_ctas, limit(plan));
  }
}

TEST(Plans, SplitKByNAndKAloneWhereTheBatchMustNotShow) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  for (int i = 0; i < 500; ++i) {
    const int n = random_size(rng), k = random_size(rng);
    const int split = plan_gemm({1, n, k, OutType::bf16, true}, 132).config.split_k;
    for (int j = 0; j < 20; ++j) {
      const GemmPlan plan = plan_gemm({random_size(rng), n, k, OutType::bf16, true}, 1 + rng() % 132);
      ASSERT_EQ(plan.config.split_k, split) << n << "x" << k;
    }
  }
}

}  // namespace
}  // namespace phalanx::plan
