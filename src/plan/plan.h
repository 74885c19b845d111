// (shape, dtype, device) -> kernel configuration. Pure functions: no CUDA call, no tensor.
#pragma once

#include <cstdint>
#include <vector>

#include "device/gemm/config.h"

namespace phalanx::plan {

struct GemmProblem {
  int m, n, k;
  OutType out;
};

struct GemmPlan {
  GemmConfig config;
  int num_ctas;  ///< persistent: at most one per SM, a multiple of the cluster size
  int group_m;   ///< tiles along M that are walked before N advances, for L2 reuse

  friend bool operator==(const GemmPlan&, const GemmPlan&) = default;
};

/// The plan for one product on `num_sms` SMs.
GemmPlan plan_gemm(const GemmProblem& problem, int num_sms);

/// Every configuration that `plan_gemm` can return.
const std::vector<GemmConfig>& all_gemm_configs();

}  // namespace phalanx::plan
