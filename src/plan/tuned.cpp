#include "plan/tuned.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "text/text.h"

namespace phalanx::plan {
namespace {

constexpr int kFormat = 1;

bool is_for(const TunedGemm& entry, std::string_view gpu, const GemmProblem& problem, int num_sms) {
  GemmProblem wanted = entry.problem;
  wanted.all_sms = problem.all_sms;        // as num_sms says
  wanted.constant_b = problem.constant_b;  // see find
  return wanted == problem && entry.num_sms == num_sms && entry.gpu == gpu;
}

OutType out_type(const std::string& name) {
  if (name == "bf16") return OutType::bf16;
  if (name == "f32") return OutType::f32;
  throw std::runtime_error(format_text("out: {}; expected bf16 or f32", name));
}

}  // namespace

std::string format_plan(const GemmPlan& plan) {
  // Names every field, so that one that is added and not printed here does not compile. The last five are the
  // problem's.
  const auto& [block_m, block_n, num_consumers, num_stages, cluster_n, cluster_m, split_k, out, grouping, operand,
               major_a, major_b] = plan.config;
  return format_text(
      "block_m={},block_n={},num_consumers={},num_stages={},cluster_n={},cluster_m={},split_k={},group_m={}", block_m,
      block_n, num_consumers, num_stages, cluster_n, cluster_m, split_k, plan.group_m);
}

std::vector<GemmPlan> runnable_plans(const GemmProblem& problem, int num_sms) {
  const int group_m = plan_gemm(problem, num_sms).group_m;
  std::vector<GemmPlan> plans;
  for (const GemmConfig& config : all_gemm_configs()) {
    const GemmPlan plan = plan_with(config, group_m, problem, num_sms);
    const bool runs =
        config.out == problem.out && config.split_k <= ceil_div(problem.k, kBlockK) &&
        plan.num_ctas <= max_ctas(config, problem, num_sms) && (!config.few_rows() || problem.m <= config.block_m) &&
        !(problem.batch_invariant && config.split_k > 1) && !may_wait_for_sms(plan, problem.all_sms, num_sms);
    if (runs) plans.push_back(plan);
  }
  return plans;
}

TunedGemms TunedGemms::from_json(std::string_view text) {
  TunedGemms tuned;
  try {
    const auto json = nlohmann::json::parse(text);
    if (json.at("format") != kFormat) throw std::runtime_error(format_text("format: expected {}", kFormat));
    for (const auto& row : json.at("gemm_fp8")) {
      tuned.put({.gpu = row.at("gpu"),
                 .problem = {.m = row.at("m"), .n = row.at("n"), .k = row.at("k"), .out = out_type(row.at("out"))},
                 .num_sms = row.at("num_sms"),
                 .config = row.at("config"),
                 .us = row.at("us"),
                 .planner_us = row.at("planner_us")});
    }
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(error.what());
  }
  return tuned;
}

std::string TunedGemms::to_json() const {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const TunedGemm& entry : entries_) {
    const GemmProblem& p = entry.problem;
    rows.push_back({{"gpu", entry.gpu},
                    {"num_sms", entry.num_sms},
                    {"m", p.m},
                    {"n", p.n},
                    {"k", p.k},
                    {"out", p.out == OutType::bf16 ? "bf16" : "f32"},
                    {"config", entry.config},
                    {"us", entry.us},
                    {"planner_us", entry.planner_us}});
  }
  return nlohmann::ordered_json{{"format", kFormat}, {"gemm_fp8", rows}}.dump(1) + "\n";
}

std::optional<GemmPlan> TunedGemms::find(std::string_view gpu, const GemmProblem& problem, int num_sms) const {
  const auto entry = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const TunedGemm& e) { return is_for(e, gpu, problem, num_sms); });
  if (entry == entries_.end()) return std::nullopt;
  const auto plan = parse_plan(entry->config, problem, num_sms);
  const auto& kernels = all_gemm_configs();
  if (!plan || std::find(kernels.begin(), kernels.end(), plan->config) == kernels.end() ||
      may_wait_for_sms(*plan, problem.all_sms, num_sms))
    return std::nullopt;
  // It was the fastest alone. Where weights may come early, a kernel that makes use of that is not given up for one
  // that does not.
  const bool gives_up = problem.constant_b && !plan->config.few_rows() && plan_gemm(problem, num_sms).config.few_rows();
  return gives_up ? std::nullopt : plan;
}

void TunedGemms::put(TunedGemm entry) {
  erase(entry.gpu, entry.problem, entry.num_sms);
  entries_.push_back(std::move(entry));
}

void TunedGemms::erase(std::string_view gpu, const GemmProblem& problem, int num_sms) {
  std::erase_if(entries_, [&](const TunedGemm& e) { return is_for(e, gpu, problem, num_sms); });
}

}  // namespace phalanx::plan
