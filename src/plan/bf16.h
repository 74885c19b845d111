// (shape, majors, device) -> kernel configuration, for products of BF16: dense ones and those of groups.
#pragma once

#include <vector>

#include "plan/grouped.h"

namespace phalanx::plan {

struct Bf16Problem {
  GroupedProblem shape;  ///< of one product: Grouping::none, one group
  Major major_a, major_b;
  bool batch_invariant = false;  ///< the split of K may not depend on M

  friend bool operator==(const Bf16Problem&, const Bf16Problem&) = default;
};

/// The plan on `num_sms` SMs. K is split only of dense products that are not batch-invariant.
GemmPlan plan_bf16(const Bf16Problem& problem, int num_sms);

/// Every configuration that `plan_bf16` can return.
const std::vector<GemmConfig>& all_bf16_configs();

/// The plan that a given configuration makes: for tuning.
GemmPlan plan_bf16_with(const GemmConfig& config, int group_m, const Bf16Problem& problem, int num_sms);

/// What PHALANX_GEMM_CONFIG says for a problem; see parse_config.
std::optional<GemmPlan> parse_bf16_plan(std::string_view text, const Bf16Problem& problem, int num_sms);

}  // namespace phalanx::plan
