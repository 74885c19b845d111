#include "plan/plan.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "device/gemm/tiles.h"
#include "plan/stages.h"

namespace phalanx::plan {
namespace {

constexpr int kSharingCtas = 4;

std::vector<GemmConfig> make_configs() {
  std::vector<GemmConfig> list;
  for (const OutType out : {OutType::bf16, OutType::f32}) {
    // Many rows: the tensor cores and shared memory decide.
    list.push_back(with_stages({.block_m = 256, .block_n = 128, .cluster_n = 2, .out = out}));
    list.push_back(with_stages({.block_m = 192, .block_n = 128, .num_consumers = 3, .out = out}));
    list.push_back(with_stages({.block_m = 192, .block_n = 96, .num_consumers = 3, .out = out}));
    list.push_back(with_stages({.block_m = 128, .block_n = 192, .cluster_m = 2, .out = out}));
    list.push_back(with_stages({.block_m = 128, .block_n = 128, .out = out}));
    // Few rows: every SM streams weights; a narrow tile or a split K gives work to all of them.
    for (const auto& [block_n, split_k] : {std::pair{32, 2}, {64, 1}, {64, 2}})
      list.push_back(with_stages({.block_m = 128, .block_n = block_n, .split_k = split_k, .out = out}));
    for (const auto& [block_n, split_k] : {std::pair{16, 1}, {32, 1}, {32, 2}, {64, 1}, {64, 2}, {128, 1}})
      list.push_back(
          with_stages({.block_m = 64, .block_n = block_n, .num_consumers = 1, .split_k = split_k, .out = out}));
    // The same, with activations shared.
    list.push_back(
        with_stages({.block_m = 64, .block_n = 64, .num_consumers = 1, .cluster_n = kSharingCtas, .out = out}));
    // Large clusters leave SMs idle unless two fit on one.
    for (const int split_k : {4, 8})
      list.push_back(
          with_stages({.block_m = 64, .block_n = 64, .num_consumers = 1, .split_k = split_k, .out = out}, kHalfOfSmem));
    // Two CTAs on an SM: one multiplies while the other stores.
    list.push_back(with_stages({.block_m = 64, .block_n = 64, .num_consumers = 1, .out = out}, kHalfOfSmem));
    // The fewest rows. Two CTAs on an SM: the next kernel's begins to stream while this one's ends.
    for (const int block_m : {8, 16})
      for (const int split_k : {1, 2, 4, 8})
        list.push_back(with_stages({.block_m = block_m, .block_n = 64, .split_k = split_k, .out = out}, kHalfOfSmem));
  }
  return list;
}

// A split of K gives work to each SM, if each has enough of it to be worth the sum. More of it costs more than it
// brings, unless a CTA would still have many k-blocks: then the second CTA of each SM keeps more loads under way
// (docs/tuning.md).
const GemmConfig& weight_streaming_config(const GemmProblem& p, int num_sms) {
  constexpr int kLongK = 64, kFewest = 6;
  const GemmConfig* best = nullptr;
  for (const GemmConfig& config : all_gemm_configs()) {
    if (!config.few_rows() || config.out != p.out || p.m > config.block_m) continue;
    if (best && config.block_m > best->block_m) break;
    const int k_blocks = ceil_div(p.k, kBlockK), ctas = plan_with(config, kDefaultGroupM, p, num_sms).num_ctas;
    const bool long_k = 2 * k_blocks / config.split_k > kLongK;  // of half as many CTAs
    const bool fits = ctas <= num_sms || (long_k && ctas <= max_ctas(config, p, num_sms));
    if (config.split_k == 1 || (fits && k_blocks / config.split_k >= kFewest)) best = &config;
  }
  return *best;
}

// The few rows' kernel for a product, or null. They take two CTAs an SM and sum K in parts that other kernels do not
// have. With more than 8 rows they are up to 6 % slower than tiles of 64, unless they may begin before the kernel ahead
// has ended, or tiles are too few for the SMs (docs/tuning.md).
const GemmConfig* few_rows_config(const GemmProblem& p, int num_sms) {
  constexpr int kFewTiles = 4;  // parts of K
  if (!p.all_sms || p.m > 16 || p.batch_invariant) return nullptr;
  const GemmConfig& config = weight_streaming_config(p, num_sms);
  return p.m <= 8 || p.constant_b || config.split_k >= kFewTiles ? &config : nullptr;
}

// Of 64 rows of long K, each CTA reads as much of A from L2 as of B from memory. Four that share it are 2 to 6 % faster
// in a chain, and as fast alone, where they fill the SMs at once (docs/tuning.md).
bool shares_activations(const GemmConfig& c, const GemmProblem& p, int num_sms) {
  constexpr int kLongK = 32;  // k-blocks
  const int tiles = ceil_div(p.n, c.block_n), slots = usable_sms(kSharingCtas, num_sms);
  return c.block_m == 64 && c.block_n == 64 && c.split_k == 1 && p.m <= c.block_m && ceil_div(p.k, kBlockK) >= kLongK &&
         tiles % kSharingCtas == 0 && tiles <= slots && tiles * 5 >= slots * 4;
}

// Cycles of the whole product, fitted to sweeps on an H200 (docs/tuning.md). It only has to put configurations in
// order.
double estimate_cycles(const GemmConfig& c, const GemmProblem& p, int num_sms) {
  constexpr double kProduct = 2.8, kWaveLatency = 92;  // a column, a product, from a full stage to its promotion
  constexpr double kOverlapped = 3.04, kStep = 253;    // a column, at least, where the next product runs under that
  // Promotion that is not hidden, and power: two consumers of one wave, of two waves; three consumers.
  constexpr double kLoss1 = 1.36, kLoss2 = 1.263, kLoss3 = 1.215;
  constexpr double kGroupLoss = 0.126;  // more, where a tile sees several scales of B
  constexpr double kDramBytes = 1884;   // per cycle, all SMs
  constexpr double kSharing = 0.668;    // how much of it tiles of the same columns save
  constexpr double kSmBytes = 61;       // per cycle, one SM
  constexpr double kLoadLatency = 2256,
                   kLoadLatencyOnce = 2921;    // from an empty stage to a full one; of B read only once
  constexpr double kTile = 2321;               // pipeline fill, epilogue, store
  constexpr double kTileBesideAnother = 0.65;  // how much of it shows if another CTA of the SM goes on
  constexpr double kSplit = 3833;              // reduction through distributed shared memory
  constexpr double kShared = 1500;             // CTAs that wait for each other, where that saves no reads of B
  constexpr double kFewLastRows = 1.8;         // times the latency, where M's last tile has few rows; measured with 129

  const DenseTiles tiles(c, p.m, p.n, 1, 0, c.cluster_size());
  const double k_blocks = ceil_div(ceil_div(p.k, kBlockK), c.split_k),
               num_ctas = double(tiles.count()) * c.cluster_size();
  const bool small = c.split_k > 1 && smem_layout(c).total <= kHalfOfSmem && c.num_consumers == 1;
  const int per_sm = small ? 2 : max_ctas(c, p, 1);
  const double slots = usable_sms(c.cluster_size(), num_sms) * per_sm, active = std::min(num_ctas, slots);
  const double sharing_sm = active > num_sms ? per_sm : 1, n = c.block_n;

  double mma = kProduct * n + kWaveLatency;
  if (c.overlaps())
    mma = std::max({kStep, kOverlapped * n, c.num_consumers * 2 * n});
  else if (c.num_consumers > 1)
    mma = std::max(mma, c.num_consumers * 2 * n *
                            ((c.num_consumers == 3 ? kLoss3
                              : c.num_waves() == 2 ? kLoss2
                                                   : kLoss1) +
                             (c.num_scales_b() > 1 ? kGroupLoss : 0)));
  mma *= c.num_waves() * sharing_sm;
  const int rows_of_tiles = std::min(tiles.tiles_m * c.cluster_m, kDefaultGroupM);  // that run together
  const double dram = n * kBlockK * active / (1 + (rows_of_tiles - 1) * kSharing) / kDramBytes;
  const double sm =
      (double(std::min(p.m, c.block_m)) / c.cluster_n + n / c.cluster_m) * kBlockK / kSmBytes * sharing_sm;
  const bool few_last_rows =
      p.m > c.block_m && (p.m - 1) % c.block_m < 16 && tiles.tiles_n > 16 && k_blocks > c.num_stages;
  const double load = (tiles.tiles_m == 1 ? kLoadLatencyOnce : kLoadLatency) * (few_last_rows ? kFewLastRows : 1) /
                      (c.num_stages * sharing_sm);
  const double tile = kTile * (c.split_k == 1 && active > num_sms ? kTileBesideAnother : 1) +
                      (c.split_k > 1 ? kSplit : 0) + (c.multicasts() && tiles.tiles_m == 1 ? kShared : 0);
  return std::ceil(num_ctas / slots) * (k_blocks * std::max({mma, dram, sm, load}) + tile);
}

}  // namespace

const std::vector<GemmConfig>& all_gemm_configs() {
  static const auto& list = *new std::vector<GemmConfig>(make_configs());
  return list;
}

int max_ctas(const GemmConfig& config, const GemmProblem& problem, int num_sms) {
  return num_sms * (problem.all_sms ? ctas_per_sm(config) : 1);
}

bool may_wait_for_sms(const GemmPlan& plan, bool all_sms, int num_sms) {
  constexpr int kGpcs = 8;  // of each, one SM less than a cluster may be left over
  return !all_sms && plan.config.split_k == 1 && plan.num_ctas + kGpcs * (plan.config.cluster_size() - 1) > num_sms;
}

GemmPlan plan_with(const GemmConfig& config, int group_m, const GemmProblem& problem, int num_sms) {
  const int cluster = config.cluster_size();
  const DenseTiles tiles(config, problem.m, problem.n, group_m, 0, cluster);
  const int resident = std::max(max_ctas(config, problem, num_sms) / cluster, 1);
  const int clusters = config.split_k > 1 ? tiles.count() : std::min(tiles.count(), resident);
  // Where one band holds all rows of tiles, it is as high as they are many: then no tile needs a division.
  const int rows = tiles.tiles_m, band = rows < group_m && (rows & (rows - 1)) == 0 ? rows : group_m;
  return {config, clusters * cluster, band};
}

GemmPlan plan_gemm(const GemmProblem& problem, int num_sms) {
  if (const GemmConfig* config = few_rows_config(problem, num_sms))
    return plan_with(*config, kDefaultGroupM, problem, num_sms);
  const GemmConfig* best = nullptr;
  double best_cycles = 0;
  for (const GemmConfig& config : all_gemm_configs()) {
    if (config.out != problem.out || config.few_rows() || config.cluster_n == kSharingCtas) continue;
    if (problem.batch_invariant && config.split_k > 1) continue;
    if (config.split_k > ceil_div(problem.k, kBlockK) || config.cluster_size() > num_sms) continue;
    const GemmPlan plan = plan_with(config, kDefaultGroupM, problem, num_sms);
    // Split-K is not persistent: all its CTAs must be within the SMs that the caller allows.
    if (config.split_k > 1 && plan.num_ctas > num_sms) continue;
    if (may_wait_for_sms(plan, problem.all_sms, num_sms)) continue;
    if (problem.m <= config.block_m - config.consumer_rows()) continue;  // a consumer would idle
    const double cycles = estimate_cycles(config, problem, num_sms);
    if (!best || cycles < best_cycles) best = &config, best_cycles = cycles;
  }
  if (problem.all_sms && shares_activations(*best, problem, num_sms))
    best = &*std::find_if(all_gemm_configs().begin(), all_gemm_configs().end(), [&](const GemmConfig& config) {
      return config.cluster_n == kSharingCtas && config.out == problem.out;
    });
  return plan_with(*best, kDefaultGroupM, problem, num_sms);
}

std::optional<ParsedConfig> parse_config(std::string_view text, const GemmConfig& config) {
  ParsedConfig parsed{config};
  auto& [c, group_m] = parsed;
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
  if (group_m < 1 || group_m != 1 << log2_of(group_m) || !is_valid(c)) return std::nullopt;
  return parsed;
}

std::optional<GemmPlan> parse_plan(std::string_view text, const GemmProblem& problem, int num_sms) {
  const auto parsed = parse_config(text, {.out = problem.out});
  if (!parsed || (parsed->config.few_rows() && problem.m > parsed->config.block_m)) return std::nullopt;
  return plan_with(parsed->config, parsed->group_m, problem, num_sms);
}

}  // namespace phalanx::plan
