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
    // Of equals the first is taken. Few rows a group: every SM streams weights. Many: measured, sharing A pays for the taller
    // tiles only.
    add(64, 128, 1, 1);
    add(64, 64, 1, 1);
    add(128, 128, 2, 1);
    add(128, 128, 2, 2);
    if (out == OutType::bf16) add(192, 128, 3, 2), add(192, 128, 3, 1), add(256, 128, 2, 2), add(256, 128, 2, 1);
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

// Cycles for a k-block of a tile of which `rows` rows are of D.
double cycles_of(const GemmConfig& c, const GroupedProblem& p, int rows) {
  constexpr double kMmaLoss = 1.27, kMmaLoss3 = 1.235, kWaveLatency = 236;  // as in the dense planner
  constexpr double kRowScaleLoss = 1.15, kRowScaleLoss3 = 1.1;              // two multiplications a value
  constexpr double kSmBytes = 52, kLoadLatency = 2294;                      // one SM, per cycle
  const int consumers = std::min(ceil_div(rows, c.consumer_rows()), c.num_consumers);
  const double n = c.block_n;
  double mma = 2.5 * n + kWaveLatency;
  if (consumers > 1) mma = std::max(mma, consumers * 2 * n * (consumers == 3 ? kMmaLoss3 : kMmaLoss));
  mma *= c.num_waves();
  if (p.grouping == Grouping::columns) mma *= c.num_consumers == 3 ? kRowScaleLoss3 : kRowScaleLoss;
  const double loaded_a =
      c.cluster_n > 1 ? double(c.block_m) / c.cluster_n : ceil_div(rows, c.rows_of_request()) * c.rows_of_request();
  return std::max({mma, (loaded_a + n / c.cluster_m) * kBlockK / kSmBytes, kLoadLatency / c.num_stages});
}

// Along M, of all groups together.
struct TilesM {
  double count = 0, k_block_cycles = 0;  // the sum over tiles

  void add(const GemmConfig& c, const GroupedProblem& p, int rows, double weight) {
    const int full = rows / c.block_m, rest = rows % c.block_m;
    count += weight * (full + (rest > 0));
    k_block_cycles += weight * full * cycles_of(c, p, c.block_m);
    if (rest > 0) k_block_cycles += weight * cycles_of(c, p, rest);
  }
};

TilesM tiles_m(const GemmConfig& c, const GroupedProblem& p) {
  TilesM tiles;
  if (p.grouping == Grouping::columns) {
    tiles.add(c, p, p.m, p.num_groups);
    return tiles;
  }
  constexpr double kSpread[] = {0.7, 0.85, 1, 1, 1, 1.15, 1.3};  // of a group's rows: routing is not even
  const double groups = std::min(p.num_groups, p.m), rows = p.expected_rows > 0 ? p.expected_rows : p.m / groups;
  for (const double factor : kSpread) tiles.add(c, p, int(std::ceil(rows * factor)), groups / std::size(kSpread));
  return tiles;
}

// Cycles of the whole product. It only has to put configurations in order; docs/tuning.md has the measurements.
double estimate_cycles(const GemmConfig& c, const GroupedProblem& p, int num_sms) {
  constexpr double kDramBytes = 1770;  // all SMs, per cycle
  constexpr double kTile = 1645;
  constexpr double kOverlap =
      0.25;  // of the shorter of two, computing and reading weights, that the longer does not hide

  const double clusters = std::max(num_sms / c.cluster_size(), 1);
  const TilesM along_m = tiles_m(c, p);
  const double tiles = along_m.count * ceil_div(p.n, c.block_n * c.cluster_n);
  const double columns = double(p.k) / (p.grouping == Grouping::columns ? p.num_groups : 1);
  const double tile = std::ceil(columns / kBlockK) * along_m.k_block_cycles / along_m.count + kTile;
  // How many tiles a CTA gets, at the worst; groups of rows are not known so well that a step at a whole number would be true.
  const double each = tiles / clusters;
  const double rounds = p.grouping == Grouping::columns || each < 1 ? std::ceil(each) : (std::ceil(each) + each) / 2;
  const double compute = rounds * tile;
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
