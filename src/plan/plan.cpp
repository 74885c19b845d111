#include "plan/plan.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "device/gemm/tiles.h"

namespace phalanx::plan {
namespace {

constexpr int kDefaultGroupM = 8;

// Fastest stage count that fits beside everything else in shared memory.
constexpr GemmConfig with_most_stages(GemmConfig c, int most) {
  for (c.num_stages = most; c.num_stages > 2 && !is_valid(c);) --c.num_stages;
  return c;
}

constexpr GemmConfig tile(int block_m, int block_n, int num_consumers, int cluster_n, int split_k, OutType out) {
  return with_most_stages({.block_m = block_m,
                           .block_n = block_n,
                           .num_consumers = num_consumers,
                           .cluster_n = cluster_n,
                           .split_k = split_k,
                           .out = out},
                          12);
}

std::vector<GemmConfig> make_configs() {
  std::vector<GemmConfig> list;
  for (const OutType out : {OutType::bf16, OutType::f32}) {
    list.push_back(tile(256, 128, 2, 2, 1, out));
    list.push_back(tile(256, 128, 2, 1, 1, out));
    list.push_back(tile(128, 128, 2, 2, 1, out));
    list.push_back(tile(128, 128, 2, 1, 1, out));
    list.push_back(tile(128, 64, 2, 1, 1, out));
    for (const int block_n : {64, 128})
      for (const int split_k : {1, 2, 4, 8}) list.push_back(tile(64, block_n, 1, 1, split_k, out));
  }
  return list;
}

// Cycles of one SM, from measurements on an H200: docs/tuning.md. Only their order matters.
double estimate_cycles(const GemmConfig& c, const GemmProblem& p, int num_sms) {
  const double k_blocks = ceil_div(ceil_div(p.k, kBlockK), c.split_k);
  const DenseTiles tiles(c, p.m, p.n, 1, 0, c.cluster_size());
  const double ctas = double(tiles.count()) * c.cluster_size();
  const double slots = num_sms / c.cluster_size() * c.cluster_size();
  const double waves = std::max(1.0, std::ceil(ctas / slots));

  // A k-block costs the larger of its products and its loads. Both overlap, the tensor cores lose some to promotion.
  const double mma =
      4.0 * c.block_m / 64 * c.block_n / 2 * (c.num_consumers == 2 ? (c.num_waves() == 2 ? 1.28 : 1.42) : 1.6);
  const double active = std::min(ctas, slots);
  const double dram_share = 2300.0 / active;  // bytes per cycle: 4.5 TB/s at 1.98 GHz, over the SMs that read
  const double b_bytes = double(c.block_n) * kBlockK, a_bytes = double(c.block_m) * kBlockK / c.cluster_n;
  const double b_reads =
      std::min(1.0, double(tiles.tiles_n) * c.cluster_n / active);  // B's share that is not re-read from L2
  const double l2_share = std::min(64.0, 5200.0 / active);
  const double load = std::max(b_bytes * b_reads / dram_share, (a_bytes + b_bytes) / l2_share);
  const double fixed = 1500 + (c.split_k > 1 ? 1200 + 100 * c.split_k : 0) + c.block_m * c.block_n / 16.0;
  return waves * (k_blocks * std::max(mma, load) + fixed);
}

}  // namespace

const std::vector<GemmConfig>& all_gemm_configs() {
  static const std::vector<GemmConfig> list = make_configs();
  return list;
}

GemmPlan plan_with(const GemmConfig& config, int group_m, const GemmProblem& problem, int num_sms) {
  const int cluster = config.cluster_size();
  const DenseTiles tiles(config, problem.m, problem.n, group_m, 0, cluster);
  const int resident = std::max(num_sms / cluster, 1);
  const int clusters = config.split_k > 1 ? tiles.count() : std::min(tiles.count(), resident);
  return {config, clusters * cluster, group_m};
}

GemmPlan plan_gemm(const GemmProblem& problem, int num_sms) {
  const GemmConfig* best = nullptr;
  double best_cycles = 0;
  for (const GemmConfig& config : all_gemm_configs()) {
    if (config.out != problem.out) continue;
    if (config.split_k > ceil_div(problem.k, kBlockK) || config.cluster_size() > num_sms) continue;
    const double cycles = estimate_cycles(config, problem, num_sms);
    if (!best || cycles < best_cycles) best = &config, best_cycles = cycles;
  }
  return plan_with(*best, kDefaultGroupM, problem, num_sms);
}

std::optional<GemmPlan> parse_plan(std::string_view text, const GemmProblem& problem, int num_sms) {
  GemmConfig c{.out = problem.out};
  int group_m = kDefaultGroupM;
  const std::pair<std::string_view, int*> fields[] = {
      {"block_m", &c.block_m},       {"block_n", &c.block_n},     {"num_consumers", &c.num_consumers},
      {"num_stages", &c.num_stages}, {"cluster_n", &c.cluster_n}, {"cluster_m", &c.cluster_m},
      {"split_k", &c.split_k},       {"group_m", &group_m},
  };
  while (!text.empty()) {
    const std::string_view item = text.substr(0, text.find(','));
    text.remove_prefix(std::min(item.size() + 1, text.size()));
    const auto equals = item.find('=');
    if (equals == std::string_view::npos) return std::nullopt;
    const auto* field = std::find_if(std::begin(fields), std::end(fields),
                                     [&](const auto& f) { return f.first == item.substr(0, equals); });
    if (field == std::end(fields)) return std::nullopt;
    const char* end = item.data() + item.size();
    const auto [stop, error] = std::from_chars(item.data() + equals + 1, end, *field->second);
    if (error != std::errc{} || stop != end) return std::nullopt;
  }
  if (group_m < 1 || !is_valid(c)) return std::nullopt;
  return plan_with(c, group_m, problem, num_sms);
}

}  // namespace phalanx::plan
