// Choices that were measured on the very machine, by `phalanx tune`, and that go before the planner's estimate. A JSON
// text, read and written here; where its file lies is not this room's business.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "plan/plan.h"

namespace phalanx::plan {

/// "block_m=256,block_n=128,...,group_m=8": what `parse_plan` reads.
std::string format_plan(const GemmPlan& plan);

/// One plan for every kernel that can do the product within so many SMs: what a measurement chooses from.
std::vector<GemmPlan> runnable_plans(const GemmProblem& problem, int num_sms);

struct TunedGemm {
  std::string gpu;  ///< its name: "NVIDIA H200"
  GemmProblem problem{};
  int num_sms = 0;        ///< that the product was allowed
  std::string config;     ///< as `format_plan` writes it
  double us = 0;          ///< the time of one product
  double planner_us = 0;  ///< that of the planner's choice, measured in turn with it
};

class TunedGemms {
 public:
  /// @throws std::runtime_error for a text that `to_json` did not write
  static TunedGemms from_json(std::string_view text);
  std::string to_json() const;

  /// The measured plan. Nothing for a product that was not measured, and where the kernel that was chosen is none of
  /// `all_gemm_configs()` any more.
  std::optional<GemmPlan> find(std::string_view gpu, const GemmProblem& problem, int num_sms) const;

  /// Replaces what there is for the same GPU, product and number of SMs.
  void put(TunedGemm entry);
  void erase(std::string_view gpu, const GemmProblem& problem, int num_sms);

  const std::vector<TunedGemm>& entries() const { return entries_; }

 private:
  std::vector<TunedGemm> entries_;
};

}  // namespace phalanx::plan
