#include "plan/bf16.h"

#include <algorithm>
#include <cmath>

#include "plan/stages.h"

namespace phalanx::plan {
namespace {

// A tile and who computes it.
struct TileShape {
  int block_m, block_n, cluster_m = 1, split_k = 1;
};

std::vector<GemmConfig> make_configs() {
  std::vector<GemmConfig> list;
  const auto add = [&](Grouping grouping, OutType out, Major a, Major b, std::initializer_list<TileShape> shapes) {
    for (const TileShape& s : shapes)
      list.push_back(with_stages({.block_m = s.block_m,
                                  .block_n = s.block_n,
                                  .num_consumers = s.block_m / 64,
                                  .cluster_m = s.cluster_m,
                                  .split_k = s.split_k,
                                  .out = out,
                                  .grouping = grouping,
                                  .operand = Operand::bf16,
                                  .major_a = a,
                                  .major_b = b}));
  };
  using enum Grouping;
  using enum OutType;
  using enum Major;
  // Many rows: wide tiles, whose bytes two CTAs share. Few rows: every SM streams weights; a narrow tile or a split K
  // gives work to all of them.
  add(none, bf16, k, k,
      {{128, 256, 2}, {128, 192, 2}, {128, 128}, {64, 64}, {64, 128}, {64, 128, 1, 2}, {64, 64, 1, 2}, {64, 64, 1, 4}});
  add(none, f32, k, k, {{128, 128}, {64, 64}, {64, 64, 1, 2}});
  // The rarer kinds have a kernel without a cluster each: a caller may allow a single SM.
  add(none, bf16, k, mn, {{128, 256, 2}, {64, 128}});
  add(none, f32, k, mn, {{128, 128}});
  for (const OutType out : {bf16, f32}) {
    add(none, out, mn, k, {{128, 128}});
    add(none, out, mn, mn, {{128, 128}});
  }
  add(rows, bf16, k, k, {{128, 256}, {64, 128}});
  add(rows, f32, k, k, {{128, 128}});
  add(rows, bf16, k, mn, {{128, 192}});
  add(rows, f32, k, mn, {{128, 128}});
  add(columns, f32, mn, mn, {{128, 192}});
  return list;
}

// Cycles of the whole product. It only has to put configurations in order; docs/tuning.md has the measurements.
double estimate_cycles(const GemmConfig& c, const GroupedProblem& p, int num_sms) {
  constexpr double kLoneLatency = 60;                // of a k-block, where no second warpgroup fills the gaps
  constexpr double kShallowLoss = 1.02;              // of three stages only
  constexpr double kDramBytes = 1770;                // per cycle, all SMs
  constexpr double kSmBytes = 52;                    // per cycle, one SM
  constexpr double kLoadLatency = 2294;              // from an empty stage to a full one
  constexpr double kTile = 900, kTileColumn = 3;     // pipeline fill, epilogue, store
  constexpr double kSplit = 4069, kSplitPart = 154;  // reduction through distributed shared memory

  const double tiles_m = expected_tiles_m(c, p) * c.cluster_m, tiles_n = ceil_div(p.n, c.block_n);
  const double columns = double(p.k) / (p.grouping == Grouping::columns ? p.num_groups : 1);
  const double k_blocks = std::ceil(std::ceil(columns / kBf16BlockK) / c.split_k);
  const double num_ctas = tiles_m * tiles_n * c.split_k;
  const double slots = usable_sms(c.cluster_size(), num_sms), active = std::min(num_ctas, slots);

  double mma = c.num_consumers * c.num_waves() * 2.0 * c.block_n;
  if (c.num_consumers == 1) mma += kLoneLatency;
  if (c.num_stages <= 3) mma *= kShallowLoss;
  const double line = 2.0 * kBf16BlockK;  // bytes of a row's k-block
  // Tiles of one column that are walked together read its weights once.
  const double together = std::clamp(tiles_m / p.num_groups, 1.0, double(kDefaultGroupM));
  const double dram = p.grouping == Grouping::columns ? 0 : c.block_n * line * active / together / kDramBytes;
  const double sm = (c.block_m + double(c.block_n) / c.cluster_m) * line / kSmBytes;
  const double k_block = std::max({mma, dram, sm, kLoadLatency / c.num_stages});
  const double tile = kTile + kTileColumn * c.block_n + (c.split_k > 1 ? kSplit + kSplitPart * c.split_k : 0);
  return std::ceil(num_ctas / slots) * (k_blocks * k_block + tile);
}

GemmProblem dense_problem(const Bf16Problem& p) {
  return {p.shape.m, p.shape.n, p.shape.k, p.shape.out, p.batch_invariant};
}

}  // namespace

const std::vector<GemmConfig>& all_bf16_configs() {
  static const auto& list = *new std::vector<GemmConfig>(make_configs());
  return list;
}

GemmPlan plan_bf16_with(const GemmConfig& config, int group_m, const Bf16Problem& problem, int num_sms) {
  return config.grouped() ? plan_grouped_with(config, group_m, problem.shape, num_sms)
                          : plan_with(config, group_m, dense_problem(problem), num_sms);
}

GemmPlan plan_bf16(const Bf16Problem& problem, int num_sms) {
  const GroupedProblem& p = problem.shape;
  const GemmConfig* best = nullptr;
  double best_cycles = 0;
  for (const GemmConfig& config : all_bf16_configs()) {
    if (config.grouping != p.grouping || config.out != p.out || config.major_a != problem.major_a ||
        config.major_b != problem.major_b)
      continue;
    if (config.cluster_size() > num_sms) continue;
    if (config.split_k > 1) {
      if (problem.batch_invariant || config.split_k > ceil_div(p.k, config.block_k())) continue;
      // Not persistent: all its CTAs must be within the SMs that the caller allows.
      if (plan_bf16_with(config, kDefaultGroupM, problem, num_sms).num_ctas > num_sms) continue;
    }
    double cycles = estimate_cycles(config, p, num_sms);
    const int height = config.block_m * config.cluster_m;
    if (height > 64 && p.m <= height / 2) cycles *= 2;  // half of the tile would be empty
    if (!best || cycles < best_cycles) best = &config, best_cycles = cycles;
  }
  // Measured: cluster tiles of 256 x 256 are walked best four high, where K is long.
  const int group_m = best->block_n == 256 && best->cluster_m == 2 ? 4 : kDefaultGroupM;
  return plan_bf16_with(*best, group_m, problem, num_sms);
}

std::optional<GemmPlan> parse_bf16_plan(std::string_view text, const Bf16Problem& problem, int num_sms) {
  const GroupedProblem& p = problem.shape;
  const auto parsed = parse_config(text, {.out = p.out,
                                          .grouping = p.grouping,
                                          .operand = Operand::bf16,
                                          .major_a = problem.major_a,
                                          .major_b = problem.major_b});
  if (!parsed || (parsed->config.grouped() && parsed->config.split_k > 1)) return std::nullopt;
  return plan_bf16_with(parsed->config, parsed->group_m, problem, num_sms);
}

}  // namespace phalanx::plan
