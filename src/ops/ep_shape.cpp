#include "ops/ep_shape.h"

#include <algorithm>
#include <cmath>

#include "cpu/ep.h"
#include "text/text.h"

namespace phalanx {
namespace {

using std::int64_t;

constexpr int kThroughputSms = 32, kLatencySms = 128;

/// CTAs that only send, so that they and those that write rows take about as long, if a token's experts are anywhere.
int num_senders(const EpShape& s) {
  constexpr int kMost = 18;  // more than the link takes
  // Of an SM, measured. Where there are many, receivers have time, and the link should have none.
  const double send_gbps = 28, write_gbps = s.num_ctas > 48 ? 50 : 41;
  if (s.num_ranks == 1 || s.num_ctas < 4) return 0;
  const double peers = (s.num_ranks - 1) * (1 - std::pow(1 - 1.0 / s.num_ranks, s.topk));  // that a token goes to
  const double send = peers / send_gbps, write = s.topk / write_gbps;
  return std::min(kMost, static_cast<int>(std::ceil(s.num_ctas * send / (send + write))));
}

bool fits(const EpShape& s) { return 4 * ep_route_smem(s, s.max_local_experts).words <= kEpMaxSmemBytes; }

int64_t num_choices(const EpShape& s) { return int64_t{s.max_tokens} * s.topk; }

/// So many CTAs, which number choices as "counted" says: where that is less work, and fits.
void set_ctas(EpShape& s, int num_ctas, const cpu::EpStandIn* simulated) {
  s.num_ctas = num_ctas;
  s.num_senders = s.counted = 0;
  // Adding up the counts of all CTAs must be less work than counting all choices.
  if (num_choices(s) > int64_t{num_ctas} * s.max_local_experts && s.num_experts <= kEpMaxCountedExperts &&
      ep_choices_per_cta(s) < kEpMaxCountedChoices) {
    s.num_senders = simulated ? simulated->num_senders : num_senders(s);
    s.counted = 1;
    s.counted = fits(s);
    if (!s.counted) s.num_senders = 0;
  }
}

bool can_number(const EpShape& s) { return s.counted || num_choices(s) < kEpMaxCountedChoices; }

/// The choices are too many for the CTAs: says so, and how many CTAs would do.
[[noreturn]] void fail_ctas(EpShape s, const cpu::EpStandIn* simulated) {
  constexpr int kMostSms = 132;  // of a GPU
  const int given = s.num_ctas;
  const bool numbered = can_number(s);
  int enough = given + 1;
  for (; enough <= kMostSms; ++enough) {
    set_ctas(s, enough, simulated);
    if (can_number(s) && fits(s)) break;
  }
  if (numbered)
    throw Error(
        ErrorCode::invalid_argument,
        format_text(
            "ExpertParallel: config.num_sms is {}, expected {} or more: an SM's share of {} tokens, top-{}, does "
            "not fit in its shared memory",
            given, enough, s.max_tokens, s.topk));
  throw Error(
      ErrorCode::invalid_argument,
      format_text("ExpertParallel: config.max_tokens is {}, expected fewer: of top-{} no more than {} choices among {} "
                  "experts can be numbered{}",
                  s.max_tokens, s.topk, kEpMaxCountedChoices - 1, s.num_experts,
                  enough <= kMostSms ? format_text(" by {} SMs; or config.num_sms of {} or more", given, enough) : ""));
}

}  // namespace

std::vector<int> first_experts(const ExpertParallelConfig& config, int num_ranks) {
  std::vector<int> first(num_ranks + 1, 0);
  for (int r = 0; r < num_ranks; ++r) {
    const int even = config.num_experts / num_ranks + (r < config.num_experts % num_ranks);
    first[r + 1] = first[r] + (config.experts_per_rank.empty() ? even : config.experts_per_rank[r]);
  }
  return first;
}

EpShape make_shape(const ExpertParallelConfig& config, int num_ranks, DeviceType type) {
  EpShape s;
  s.num_ranks = num_ranks;
  s.hidden = config.hidden;
  s.topk = config.topk;
  s.max_tokens = config.max_tokens;
  s.num_buffers = config.latency ? 2 : 1;
  s.wide = config.dtype == DType::bf16;
  s.num_experts = config.num_experts;
  const std::vector<int> first = first_experts(config, num_ranks);
  for (int r = 0; r < num_ranks; ++r) s.max_local_experts = std::max(s.max_local_experts, first[r + 1] - first[r]);
  const cpu::EpStandIn* simulated = type == DeviceType::cpu ? cpu::ep_stand_in.load() : nullptr;
  if (type == DeviceType::cuda || simulated) {
    // So that with a token or two for each CTA, every sending warp has work.
    if (config.latency) s.log2_parts = log2_of(std::min(kEpSendWarps, ep_num_blocks(config.hidden)));
    set_ctas(s,
             simulated        ? simulated->num_ctas
             : config.num_sms ? config.num_sms
             : config.latency ? kLatencySms
                              : kThroughputSms,
             simulated);
    if (!can_number(s) || !fits(s)) fail_ctas(s, simulated);
  }
  return s;
}

}  // namespace phalanx
