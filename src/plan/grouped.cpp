#include "plan/grouped.h"

#include <algorithm>
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
    // Of equals the first is taken: measured, sharing A pays for the taller tile only.
    if (out == OutType::bf16) add(192, 128, 3, 2), add(192, 128, 3, 1);
    add(128, 128, 2, 1);
    add(128, 128, 2, 2);
    // Few rows a group: every SM streams weights.
    add(64, 128, 1, 1);
    add(64, 64, 1, 1);
  }
  for (const auto& [block_m, cluster_n] : {std::pair{192, 1}, {128, 1}, {128, 2}})
    list.push_back(with_stages({.block_m = block_m,
                                .block_n = 128,
                                .num_consumers = block_m / 64,
                                .cluster_n = cluster_n,
                                .out = OutType::f32,
                                .grouping = Grouping::columns}));
  return list;
}

// Cycles of the whole product. It only has to put configurations in order; docs/tuning.md has the measurements.
double estimate_cycles(const GemmConfig& c, const GroupedProblem& p, int num_sms) {
  constexpr double kMmaLoss = 1.27, kMmaLoss3 = 1.235, kWaveLatency = 236;  // as in the dense planner
  constexpr double kRowScaleLoss = 1.6, kRowScaleLoss3 = 1.25;  // two multiplications a value; three hide more
  constexpr double kDramBytes = 1770, kSmBytes = 52;            // per cycle: all SMs, one SM
  constexpr double kLoadLatency = 2294, kTile = 1645;
  constexpr double kOverlap =
      0.25;  // of the shorter of two, computing and reading weights, that the longer does not hide

  const double clusters = std::max(num_sms / c.cluster_size(), 1);
  const double tiles_n = ceil_div(p.n, c.block_n * c.cluster_n), tiles = expected_tiles_m(c, p) * tiles_n;
  const double columns = double(p.k) / (p.grouping == Grouping::columns ? p.num_groups : 1);
  const double k_blocks = std::ceil(columns / kBlockK), n = c.block_n;
  double mma = 2.5 * n + kWaveLatency;
  if (c.num_consumers > 1) mma = std::max(mma, c.num_consumers * 2 * n * (c.num_consumers == 3 ? kMmaLoss3 : kMmaLoss));
  mma *= c.num_waves();
  if (p.grouping == Grouping::columns) mma *= c.num_consumers == 3 ? kRowScaleLoss3 : kRowScaleLoss;
  const double sm = (double(c.block_m) / c.cluster_n + n / c.cluster_m) * kBlockK / kSmBytes;
  const double k_block = std::max({mma, sm, kLoadLatency / c.num_stages});
  // How many tiles a CTA gets, at the worst; groups of rows are not known so well that a step at a whole number would be true.
  const double each = tiles / clusters;
  const double rounds = p.grouping == Grouping::columns || each < 1 ? std::ceil(each) : (std::ceil(each) + each) / 2;
  const double compute = rounds * (k_blocks * k_block + kTile);
  const double weights =
      p.grouping == Grouping::rows ? double(p.num_groups) * p.n * p.k / kDramBytes * std::min(rounds / each, 2.0) : 0;
  return std::max(compute, weights) + kOverlap * std::min(compute, weights);
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
