#include "plan/grouped.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

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
    // Of equals the first is taken. Few rows a group: every SM streams weights.
    add(64, 128, 1, 1);
    add(64, 64, 1, 1);
    if (out == OutType::bf16) add(64, 96, 1, 1), add(128, 64, 2, 1), add(128, 96, 2, 1);
    add(128, 128, 2, 1);
    add(128, 192, 2, 1);
    for (const int cluster_n : {2, 1}) add(192, 128, 3, cluster_n), add(256, 128, 2, cluster_n);
  }
  for (const auto& [block_m, num_consumers] : {std::pair{64, 1}, {128, 2}, {192, 3}})
    list.push_back(with_stages({.block_m = block_m,
                                .block_n = kScaleBlock,
                                .num_consumers = num_consumers,
                                .cluster_n = 2,
                                .out = OutType::swiglu,
                                .grouping = Grouping::rows}));
  list.push_back(with_stages({.out = OutType::f32, .grouping = Grouping::columns}));
  return list;
}

// Cycles for a k-block of a tile of which `rows` rows are of D.
double cycles_of(const GemmConfig& c, int rows) {
  constexpr double kMmaLoss = 1.37, kMmaLossWide = 1.34, kMmaLossTwoWaves = 1.26, kMmaLoss3 = 1.235, kWaveLatency = 236;
  constexpr double kNotShared = 1.012;                  // of three consumers whose A no other CTA shares
  constexpr double kSmBytes = 46, kLoadLatency = 2294;  // one SM, per cycle
  const int consumers = std::min(ceil_div(rows, c.consumer_rows()), c.num_consumers);
  const double n = c.block_n, loss = consumers == 3       ? kMmaLoss3
                                     : c.num_waves() == 2 ? kMmaLossTwoWaves
                                     : n > kScaleBlock    ? kMmaLossWide
                                                          : kMmaLoss;
  double mma = 2.5 * n + kWaveLatency;
  if (consumers > 1) mma = std::max(mma, consumers * 2 * n * loss);
  if (c.num_consumers == 3 && !c.multicasts()) mma *= kNotShared;
  mma *= c.num_waves();
  const double loaded_a =
      c.cluster_n > 1 ? double(c.block_m) / c.cluster_n : ceil_div(rows, c.rows_of_request()) * c.rows_of_request();
  return std::max({mma, (loaded_a + n / c.cluster_m) * kBlockK / kSmBytes, kLoadLatency / c.num_stages});
}

// The groups that have rows (or columns), and how many. Of groups with few on average some have none.
struct Groups {
  double count, rows;

  explicit Groups(const GroupedProblem& p) : count(p.num_groups), rows(p.m) {
    if (p.grouping != Grouping::rows) return;
    const double mean = p.expected_rows > 0 ? p.expected_rows : rows / count, filled = 1 - std::exp(-mean);
    count *= filled, rows = mean / filled;
  }
};

// How far groups are from their mean. Routing is not even: who says what to expect names a mean; otherwise an even
// share is likely.
using Spread = std::array<double, 6>;
Spread spread_of(const GroupedProblem& p) {
  if (p.grouping != Grouping::rows) return {1, 1, 1, 1, 1, 1};
  if (p.expected_rows > 0) return {0.7, 0.82, 0.94, 1.06, 1.18, 1.3};
  return {0.9, 1.0, 1.0, 1.0, 1.0, 1.1};
}

// Mostly it has to put configurations in order; docs/tuning.md has the measurements.
double estimate_cycles(const GemmConfig& c, const GroupedProblem& p, int num_sms) {
  constexpr double kDramBytes = 1770, kDramBytesOnce = 2200;  // all SMs, per cycle; if weights leave L2 first
  constexpr double kTile = 1645, kCluster = 1500;
  constexpr double kSwiglu = 850;      // of a consumer's rows, in the epilogue: nothing hides it
  constexpr double kTwoScales = 11.5;  // of B instead of one, a k-block of a consumer's rows
  constexpr double kOverlap = 0.25;    // of the shorter of computing and reading weights, that the longer does not hide
  constexpr double kOverlapOnce = 0.03, kTileOnce = 0.15;  // the same if weights leave L2 first, and of one tile
  constexpr double kNotShared = 1.03;  // weights that compete with rows of A which no other CTA shares

  const bool by_rows = p.grouping == Grouping::rows, once = by_rows && weights_leave_l2_first(c, p);
  const Groups groups(p);
  const Spread spread = spread_of(p);
  Spread tiles{};                     // of clusters, along M
  double mean_tiles = 0, cycles = 0;  // of a group; cycles are of a k-block of all of its tiles
  for (std::size_t i = 0; i < spread.size(); ++i) {
    const int rows = int(std::min(std::ceil(groups.rows * spread[i]), 1e9));
    const int height = c.block_m * c.cluster_m, full = rows / height, rest = rows % height;
    tiles[i] = full + (rest > 0);
    mean_tiles += tiles[i] / spread.size();
    cycles +=
        (full * cycles_of(c, c.block_m) + (rest > 0 ? cycles_of(c, std::min(rest, c.block_m)) : 0)) / spread.size();
  }
  const double k_blocks = std::ceil(double(p.k) / (by_rows ? 1 : p.num_groups) / kBlockK);
  const double swiglu = c.gates_and_ups() ? c.num_consumers * (kSwiglu + kTwoScales * k_blocks) : 0;
  const double tile = k_blocks * cycles / mean_tiles + kTile + swiglu;
  const double tiles_n = ceil_div(p.n, c.block_n * c.cluster_n), clusters = std::max(num_sms / c.cluster_size(), 1);
  const double all_weights = by_rows ? groups.count * p.n * p.k / (once ? kDramBytesOnce : kDramBytes) : 0;
  double sum = c.cluster_size() > 1 ? kCluster * spread.size() : 0;
  for (const double of_one : tiles) {  // of many groups the sum spreads less than each
    const double of_mean = mean_tiles + (of_one - mean_tiles) / std::sqrt(std::max(groups.count, 1.0));
    const double each = groups.count * of_mean * tiles_n / clusters, rounds = std::ceil(each - 1e-9);
    const double weights =
        all_weights * std::min(rounds / each, 2.0) * (c.block_m >= 192 && !c.multicasts() ? kNotShared : 1);
    sum += std::max(rounds * tile, weights) + (once ? kOverlapOnce : kOverlap) * std::min(rounds * tile, weights) +
           (once ? kTileOnce * tile : 0);
  }
  return sum / double(spread.size());
}

struct Choice {
  const GemmConfig* config = nullptr;
  double cycles = 0;
};

// Who expects one row may get none: most groups' weights are not read then, and fewer tiles are left than SMs. Estimates
// that lie close together are not to be trusted there; these two widths are a fifth quicker at times, and seldom slower.
bool suits_expected_rows(const GemmConfig& config, const GroupedProblem& p) {
  return p.expected_rows != 1 || config.out == OutType::swiglu ||
         (config.block_m == 64 && kScaleBlock % config.block_n == 0);
}

Choice quickest(const GroupedProblem& problem, int num_sms) {
  Choice best;
  for (const GemmConfig& config : all_grouped_configs()) {
    if (config.grouping != problem.grouping || config.out != problem.out || config.cluster_size() > num_sms) continue;
    if (config.grouping == Grouping::rows && !suits_expected_rows(config, problem)) continue;
    if (config.out != OutType::swiglu &&  // of which all are clusters
        may_wait_for_sms(plan_grouped_with(config, kDefaultGroupM, problem, num_sms), problem.all_sms, num_sms))
      continue;
    const double cycles = estimate_cycles(config, problem, num_sms);
    if (!best.config || cycles < best.cycles) best = {&config, cycles};
  }
  return best;
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
  static const auto& list = *new std::vector<GemmConfig>(make_configs());
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
  if (problem.out == OutType::swiglu) num_sms = std::max(num_sms, 2);  // two CTAs have what shares a scale
  // Of gradients, all operands together are little more than L2 holds: a taller band reads less of them again.
  const int group_m = problem.grouping == Grouping::columns ? 2 * kDefaultGroupM : kDefaultGroupM;
  return plan_grouped_with(*quickest(problem, num_sms).config, group_m, problem, num_sms);
}

bool weights_leave_l2_first(const GemmConfig& config, const GroupedProblem& problem) {
  constexpr double kLarge = 8 << 20, kTooLarge = 320e6;  // bytes: 200 MB were 3 to 5 % faster so, 470 MB 2 % slower
  constexpr double kRowsOfTile = 0.75;                   // on average, so that few groups have more than a tile
  const Groups groups(problem);
  const double bytes = groups.count * problem.n * problem.k;
  return config.may_read_b_once() && groups.rows <= kRowsOfTile * config.block_m && bytes >= kLarge &&
         bytes <= kTooLarge;
}

bool swiglu_in_epilogue(const GroupedProblem& problem, int num_sms) {
  constexpr double kFewRows =
      8;  // of a group: below, reading weights by pairs of CTAs costs more than the second kernel
  constexpr double kSecondKernel = 6000, kSecondBytes = 1900;  // its start; what it reads and writes per cycle
  const Groups groups(problem);
  if (num_sms < 2 || groups.rows < kFewRows) return false;
  GroupedProblem product = problem;
  product.out = OutType::bf16;
  const double bytes = 2.5 * groups.count * groups.rows * problem.n;
  const double two = quickest(product, num_sms).cycles + kSecondKernel + bytes / kSecondBytes;
  return quickest(problem, num_sms).cycles < two;
}

}  // namespace phalanx::plan
