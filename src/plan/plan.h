// (shape, dtype, device) -> kernel configuration. Pure functions: no CUDA call, no tensor.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "device/gemm/config.h"

namespace phalanx::plan {

struct GemmProblem {
  int m, n, k;
  OutType out;
  bool batch_invariant = false;  ///< the split of K may not depend on M
  bool all_sms = false;          ///< no other kernel needs SMs: two CTAs may share each, and clusters find theirs
  bool constant_b = false;       ///< the first of B may be read before the kernel ahead has ended

  friend bool operator==(const GemmProblem&, const GemmProblem&) = default;
};

struct GemmPlan {
  GemmConfig config;
  int num_ctas;  ///< persistent: as many as fit at once, in whole clusters; split-K: one cluster per tile
  int group_m;   ///< tiles along M that are walked before N advances, for L2 reuse

  friend bool operator==(const GemmPlan&, const GemmPlan&) = default;
};

/// The plan for one product on `num_sms` SMs.
GemmPlan plan_gemm(const GemmProblem& problem, int num_sms);

/// Every configuration that `plan_gemm` can return.
const std::vector<GemmConfig>& all_gemm_configs();

/// CTAs of a kernel that `num_sms` SMs are to hold at once.
int max_ctas(const GemmConfig& config, const GemmProblem& problem, int num_sms);

/// Whether CTAs of a persistent kernel may have to wait until kernels beside it end: a cluster needs SMs of one GPC, and
/// what others leave of the GPU may be any `num_sms`.
bool may_wait_for_sms(const GemmPlan& plan, bool all_sms, int num_sms);

/// The plan that a given configuration makes for a problem: for tuning.
GemmPlan plan_with(const GemmConfig& config, int group_m, const GemmProblem& problem, int num_sms);

constexpr int kDefaultGroupM = 8;

/// A configuration that somebody asks for.
struct ParsedConfig {
  GemmConfig config;
  int group_m = kDefaultGroupM;
};

/// Parses "block_m=256,block_n=128,num_stages=3,...,group_m=8", names as in GemmConfig, what is absent as in `config`.
/// Nothing if a name is unknown or the configuration is not valid.
std::optional<ParsedConfig> parse_config(std::string_view text, const GemmConfig& config);

/// The plan that such a configuration makes.
std::optional<GemmPlan> parse_plan(std::string_view text, const GemmProblem& problem, int num_sms);

}  // namespace phalanx::plan
