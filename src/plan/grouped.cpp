#include "plan/grouped.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "device/gemm/grouped_tiles.h"
#include "plan/stages.h"

namespace phalanx::plan {
namespace {

std::vector<GemmConfig> make_configs() {
  std::vector<GemmConfig> list;
  for (const OutType out : {OutType::bf16, OutType::f32}) {
    const auto add = [&](int block_m, int block_n, int num_consumers, int cluster_n) {
      list.push_back(with_stages({.block_m = block_m,
                                  .block_n = block_n,
                                  .num_consumers = num_consumers,
                                  .cluster_n = cluster_n,
                                  .out = out,
                                  .grouping = Grouping::rows}));
    };
    // Of equals the first is taken. Few rows a group: every SM streams weights. Many: measured, sharing A pays for the taller
    // tiles only.
    add(64, 128, 1, 1);
    add(64, 64, 1, 1);
    add(128, 128, 2, 1);
    if (out == OutType::bf16) add(192, 128, 3, 2), add(192, 128, 3, 1), add(256, 128, 2, 2);
  }
  for (const int num_consumers : {3, 2})
    list.push_back(with_stages({.block_m = 64 * num_consumers,
                                .block_n = 128,
                                .num_consumers = num_consumers,
                                .out = OutType::f32,
                                .grouping = Grouping::columns}));
  return list;
}

// Cycles for a k-block of a tile of which `rows` rows are of D.
double cycles_of(const GemmConfig& c, const GroupedProblem& p, int rows) {
  constexpr double kMmaLoss = 1.39, kMmaLossTwoWaves = 1.295, kMmaLoss3 = 1.235, kWaveLatency = 236;
  constexpr double kRowScaleLoss = 1.27, kRowScaleLoss3 = 1.235;  // two multiplications a value
  constexpr double kNotShared = 1.025;                            // of a tall tile whose A no other CTA shares
  constexpr double kSmBytes = 46, kLoadLatency = 2294;            // one SM, per cycle
  const int consumers = std::min(ceil_div(rows, c.consumer_rows()), c.num_consumers);
  const double n = c.block_n, loss = consumers == 3 ? kMmaLoss3 : c.num_waves() == 2 ? kMmaLossTwoWaves : kMmaLoss;
  double mma = 2.5 * n + kWaveLatency;
  if (consumers > 1) mma = std::max(mma, consumers * 2 * n * loss);
  if (c.num_consumers == 3 && !c.multicasts()) mma *= kNotShared;
  mma *= c.num_waves();
  if (p.grouping == Grouping::columns) mma *= c.num_consumers == 3 ? kRowScaleLoss3 : kRowScaleLoss;
  const double loaded_a =
      c.cluster_n > 1 ? double(c.block_m) / c.cluster_n : ceil_div(rows, c.rows_of_request()) * c.rows_of_request();
  return std::max({mma, (loaded_a + n / c.cluster_m) * kBlockK / kSmBytes, kLoadLatency / c.num_stages});
}

// Cycles of the whole product, if every group of rows has so many.
double estimate_cycles(const GemmConfig& c, const GroupedProblem& p, int num_sms, int rows) {
  constexpr double kDramBytes = 1770;  // all SMs, per cycle
  constexpr double kTile = 1645;
  constexpr double kOverlap = 0.25;  // of the shorter of computing and reading weights, that the longer does not hide
  const bool by_rows = p.grouping == Grouping::rows;

  const int full = rows / c.block_m, rest = rows % c.block_m;
  const double tiles_m = full + (rest > 0),
               k_block = (full * cycles_of(c, p, c.block_m) + (rest > 0 ? cycles_of(c, p, rest) : 0)) / tiles_m;
  const double k_blocks = std::ceil(double(p.k) / (by_rows ? 1 : p.num_groups) / kBlockK);
  const double groups = by_rows ? std::min(p.num_groups, p.m) : p.num_groups;
  const double each =
      groups * tiles_m * ceil_div(p.n, c.block_n * c.cluster_n) / std::max(num_sms / c.cluster_size(), 1);
  const double compute = std::ceil(each) * (k_blocks * k_block + kTile);
  const double weights = by_rows ? groups * p.n * p.k / kDramBytes * std::min(std::ceil(each) / each, 2.0) : 0;
  return std::max(compute, weights) + kOverlap * std::min(compute, weights);
}

// It only has to put configurations in order; docs/tuning.md has the measurements.
double estimate_cycles(const GemmConfig& c, const GroupedProblem& p, int num_sms) {
  if (p.grouping == Grouping::columns) return estimate_cycles(c, p, num_sms, p.m);
  // Routing is not even: who says what to expect names a mean; otherwise an even share is likely.
  constexpr std::array kHinted = {0.7, 0.82, 0.94, 1.06, 1.18, 1.3}, kEven = {0.9, 1.0, 1.0, 1.0, 1.0, 1.1};
  const double rows = p.expected_rows > 0 ? p.expected_rows : double(p.m) / std::min(p.num_groups, p.m);
  double sum = 0;
  for (const double factor : p.expected_rows > 0 ? kHinted : kEven)
    sum += estimate_cycles(c, p, num_sms, int(std::min(std::ceil(rows * factor), 1e9)));
  return sum;
}

}  // namespace

double expected_tiles_m(const GemmConfig& c, const GroupedProblem& p) {
  const double height = c.block_m * c.cluster_m;
  if (p.grouping != Grouping::rows) return double(p.num_groups) * std::ceil(p.m / height);
  const double groups = std::min(p.num_groups, p.m);
  const double rows = p.expected_rows > 0 ? p.expected_rows : p.m / groups;
  return groups * (std::ceil(rows / height) + rows / height + 0.5) / 2;
}

const std::vector<GemmConfig>& all_grouped_configs() {
  static const std::vector<GemmConfig> list = make_configs();
  return list;
}

GemmPlan plan_grouped_with(const GemmConfig& config, int group_m, const GroupedProblem& p, int num_sms) {
  const int cluster = config.cluster_size(), height = config.block_m * config.cluster_m;
  const std::int64_t tiles_n = ceil_div(p.n, config.block_n * config.cluster_n);
  // The most tiles that there can be: every group's last may be a partial one.
  const std::int64_t tiles_m = p.grouping == Grouping::columns ? std::int64_t(p.num_groups) * ceil_div(p.m, height)
                                                               : p.m / height + std::min(p.num_groups, p.m);
  const std::int64_t resident = std::max(num_sms / cluster, 1);
  return {config, int(std::min(tiles_m * tiles_n, resident)) * cluster, group_m};
}

GemmPlan plan_grouped(const GroupedProblem& problem, int num_sms) {
  const GemmConfig* best = nullptr;
  double best_cycles = 0;
  for (const GemmConfig& config : all_grouped_configs()) {
    if (config.grouping != problem.grouping || config.out != problem.out || config.cluster_size() > num_sms) continue;
    const double cycles = estimate_cycles(config, problem, num_sms);
    if (!best || cycles < best_cycles) best = &config, best_cycles = cycles;
  }
  return plan_grouped_with(*best, kDefaultGroupM, problem, num_sms);
}

}  // namespace phalanx::plan
