// (groups, shape, device) -> kernel configuration, for products whose groups' sizes only the device knows.
#pragma once

#include <vector>

#include "plan/plan.h"

namespace phalanx::plan {

struct GroupedProblem {
  Grouping grouping;
  int num_groups;
  int m, n,
      k;  ///< of rows: M of all groups together, the most that they may have; of columns: M and N of each group's D
  int expected_rows;  ///< of a group of rows; 0: M shared out evenly
  OutType out;
  bool all_sms = false;  ///< as in GemmProblem

  friend bool operator==(const GroupedProblem&, const GroupedProblem&) = default;
};

/// The plan on `num_sms` SMs. No choice changes a bit of the result: K is never split.
GemmPlan plan_grouped(const GroupedProblem& problem, int num_sms);

/// Whether a product of gates and ups, with SwiGLU in its epilogue, is quicker than one to BF16 and a kernel after it.
bool swiglu_in_epilogue(const GroupedProblem& problem, int num_sms);

/// Whether weights are the first to leave L2, so that what others wrote there need not be written back meanwhile: those
/// of groups of rows with a tile each, where there are neither few of them nor many times what L2 holds.
bool weights_leave_l2_first(const GemmConfig& config, const GroupedProblem& problem);

/// Every configuration that `plan_grouped` can return.
const std::vector<GemmConfig>& all_grouped_configs();

/// Tiles along M of all groups together, about: of groups of random size half a tile more than rows would fill.
double expected_tiles_m(const GemmConfig& config, const GroupedProblem& problem);

/// The plan that a given configuration makes: for tuning.
GemmPlan plan_grouped_with(const GemmConfig& config, int group_m, const GroupedProblem& problem, int num_sms);

}  // namespace phalanx::plan
