// The symmetric buffer of an expert-parallel group, for host and device: the one place where its offsets are made.
//
//   rank d's buffer   words    stop and epochs (its own), credits, flags (written by peers)
//                     then, once or twice ("buffers"; an operation of epoch n uses buffer n % num_buffers):
//                     headers  [R]            how many tokens source s has
//                     choices  [R][T][K]      s's topk_idx, numbered, each with the epoch; where "counted" with the weight
//                     weights  [R][T][K]      s's topk_weights, each with the epoch; not where "counted"
//                     counts   [R][E]         s's choices of this rank's experts, with the epoch
//                              [R][G][E]      where "counted": by the tokens of s's CTA
//                     scales   [R][T][H/128]  where "counted": s's scales
//                     tokens   [R][T]         dispatch slots: s's token t, if it has an expert on d
//                              [R - 1][T]     where "counted": d's own tokens need none
//                     sums     [R - 1][T]     combine slots: what rank s has summed for d's token t
//
// A slot's number is the token's number at home, in both directions: a slot needs no agreement, only a credit.
//
// With many tokens a flag tells that slots have come: it costs 3 us, until all that was stored before it is there. With
// few nothing does but the slots themselves: each of their words is kEpNothing before it comes, and again when it was
// read.
//
// Work is cut the same way on every rank. CTA c of G owns the tokens [c * n, (c + 1) * n) of each source s, n =
// ceil(tokens_s / G): all CTAs in combine, in dispatch those that receive. A token may be cut into 2^log2_parts pieces
// of columns; where "counted", every piece of dispatch has a flag of its own at the destination.
//
// With many tokens, some CTAs of dispatch only send. Where one CTA does both, its stores to peers, of which a link
// takes 360 GB/s, stand in the way of those to its own memory.
#pragma once
#include "device/divisor.h"

namespace phalanx {

constexpr int kEpMaxRanks = 64;
constexpr int kEpMaxTopk = 32;   // one lane of a warp for each choice
constexpr int kEpColumns = 128;  // a piece begins at a multiple of this: a whole block of scales

// Roles of a CTA's warps in dispatch: the first ones send tokens, the others see to routing, and then all write rows.
constexpr int kEpSendWarps = 8, kEpRouteWarps = 8, kEpDispatchWarps = kEpSendWarps + kEpRouteWarps;

// Scales that go to peers apart from their tokens: what a CTA turns around in shared memory at a time. The pitch is one
// of 16 bytes.
constexpr int kEpTurnedTokens = 32, kEpTurnedBlocks = 64, kEpTurnedPitch = kEpTurnedBlocks + 4;

// Flags are raised for so many pieces of a warp together, as a release waits for all of the SM's stores.
constexpr int kEpPiecesPerFlag = 8;

// Pieces of 16 bytes that a thread of dispatch has on their way, in registers. With few tokens a warp moves a single
// part of one, and fetching instructions that run once takes longer than the bytes.
template <bool kCounted>
constexpr int kEpDispatchPieces = kCounted ? 8 : 2;
struct alignas(16) EpVector {
  u32 word[4];
};
constexpr int kEpPitch = 32 * 16;  // bytes of a warp's pieces, from one of a thread's pieces to its next

// Combine: a CTA has two halves, which share nothing but their end: warps that sum, one that lists rows, one that loads
// them into a ring of stages. One more warp signals for both. A stage holds a row, or so many columns of one: as many
// as its warps sum, kEpSumPieces of 16 bytes a thread. With few tokens half of it stays empty, as it would be with half
// of the columns of 7168.
constexpr int kEpHalves = 2, kEpSumWarps = 7;
constexpr int kEpSumPitch = kEpSumWarps * kEpPitch;  // in a stage, from one of a thread's pieces to its next
constexpr int kEpCombineWarps = kEpHalves * (kEpSumWarps + 2) + 1;
constexpr int kEpStages = 6;
template <bool kFew>
constexpr int kEpSumPieces = kFew ? 2 : 4;
template <bool kFew>
constexpr int kEpStageBytes = kEpSumPieces<kFew>* kEpSumPitch;
constexpr int kEpUnitsAhead = 4;  // sums whose rows' numbers are on their way to the warp that lists them
// Rows that may be listed ahead: one a lane, beside those that keep their places while they are in the stages. Lanes of
// a warp wait for their places together.
constexpr int kEpListed = 32 + kEpStages + 2;
constexpr int kEpCombineSmemBytes =
    kEpHalves * (kEpStages * (kEpStageBytes<false> + 16) + kEpListed * 80 + kEpUnitsAhead * 32 * 12 + 8 * 64) + 1024;

// What is agreed upon by all ranks.
struct EpShape {
  int num_ranks = 1, hidden = 0, topk = 1, max_tokens = 0;
  int num_ctas = 1, log2_parts = 0, num_buffers = 1;  // buffers: 1 or 2
  int num_senders = 0;                                // CTAs of dispatch, the last ones, that only send tokens
  int num_experts = 1, max_local_experts = 1;
  int wide = 0;     // slots hold BF16, not only E4M3
  int counted = 0;  // with many tokens: a CTA numbers its own choices only, and receivers add up the CTAs before
};

constexpr i64 ep_align(i64 bytes) { return (bytes + 15) / 16 * 16; }
constexpr i64 ep_align_region(i64 bytes) { return (bytes + 127) / 128 * 128; }

constexpr int ep_num_blocks(int hidden) { return ceil_div(hidden, kEpColumns); }
// E4M3 data, then but where "counted" FP32 scales; or BF16 data.
constexpr i64 ep_scale_bytes(int hidden) { return ep_align(4 * i64(ep_num_blocks(hidden))); }
constexpr i64 ep_scales_offset(int hidden) { return ep_align(hidden); }
constexpr i64 ep_bf16_bytes(int hidden) { return ep_align(2 * i64(hidden)); }
constexpr i64 ep_token_slot(const EpShape& s) {
  const i64 bf16 = s.wide ? ep_bf16_bytes(s.hidden) : 0,
            e4m3 = ep_align(s.hidden) + (s.counted ? 0 : ep_scale_bytes(s.hidden));
  return e4m3 < bf16 ? bf16 : e4m3;
}
// BF16 sums, then one FP32 value for each choice.
constexpr i64 ep_sum_slot(const EpShape& s) { return ep_bf16_bytes(s.hidden) + ep_align(4 * i64(s.topk)); }

// The four sequences of operations. A kernel that both sends and receives takes a step in both.
enum EpSequence { kEpDispatchSend, kEpDispatchRecv, kEpCombineSend, kEpCombineRecv, kEpSequences };

struct EpWords {
  u64 stop;  // not 0: give up waiting. 1 + the rank that called abort(), or that timed out
  u64 pad[7];
  u64 recorded;  // not 0: the status has been written
};

struct EpLayout {
  i64 epochs;                           // u64 [sequences][G]: operations that a CTA of this rank has finished
  i64 dispatch_credit, combine_credit;  // u64 [R][G]: epoch that a CTA of rank d has finished to read
  i64 route_flags, scale_flags;         // u64 [R][G]
  i64 row_flags;                        // u64 [G]: the tokens of rows, written by this rank
  i64 token_flags;                      // u64 [R][T][parts], where "counted"; else [R], and only the CPU backend's
  i64 sum_flags;                        // u64 [R][G][halves]; where they halve columns, the first is both's
  i64 buffers, buffer_stride;
  i64 headers, choices, weights, counts, scales, tokens, sums;  // within a buffer
  i64 token_slot, sum_slot;                                     // bytes
  i64 bytes;                                                    // of it all
};

constexpr i64 ep_flags_per_rank(const EpShape& s) {
  return s.counted ? i64(s.max_tokens > 0 ? s.max_tokens : 1) << s.log2_parts : 1;
}

constexpr EpLayout ep_layout(const EpShape& s) {
  const i64 ranks = s.num_ranks, peers = ranks - 1, tokens = s.max_tokens;
  const i64 choices = ep_align_region(ranks * tokens * s.topk * 8);
  EpLayout l{};
  l.token_slot = ep_token_slot(s);
  l.sum_slot = ep_sum_slot(s);
  l.epochs = ep_align_region(sizeof(EpWords));
  l.dispatch_credit = l.epochs + ep_align_region(kEpSequences * s.num_ctas * 8);
  l.combine_credit = l.dispatch_credit + ep_align_region(ranks * s.num_ctas * 8);
  l.route_flags = l.combine_credit + ep_align_region(ranks * s.num_ctas * 8);
  l.scale_flags = l.route_flags + ep_align_region(ranks * s.num_ctas * 8);
  l.row_flags = l.scale_flags + ep_align_region(ranks * s.num_ctas * 8);
  l.token_flags = l.row_flags + ep_align_region(s.num_ctas * 8);
  l.sum_flags = l.token_flags + ep_align_region(ranks * ep_flags_per_rank(s) * 8);
  l.buffers = l.sum_flags + ep_align_region(ranks * s.num_ctas * kEpHalves * 8);
  l.headers = 0;
  l.choices = ep_align_region(ranks * 8);
  l.weights = l.choices + choices;
  l.counts = l.weights + choices;
  l.scales = l.counts + ep_align_region(ranks * s.max_local_experts * (s.counted ? 4 * s.num_ctas : 8));
  l.tokens = l.scales + ep_align_region(s.counted ? ranks * tokens * ep_scale_bytes(s.hidden) : 0);
  l.sums = l.tokens + ep_align_region((s.counted ? peers : ranks) * tokens * l.token_slot);
  l.buffer_stride = l.sums + ep_align_region(peers * tokens * l.sum_slot);
  l.bytes = l.buffers + s.num_buffers * l.buffer_stride;
  return l;
}

// Of rank `peer` among all but `rank`.
constexpr int ep_peer_idx(int rank, int peer) { return peer < rank ? peer : peer - 1; }

// A slot's word that has not come. Nobody sends one: four E4M3 or two BF16, all NaN, of which the last loses its sign.
constexpr u32 kEpNothing = 0xffffffffu;
constexpr u32 ep_something(u32 word) { return word == kEpNothing ? word >> 1 : word; }

// --- flags ----------------------------------------------------------------------------------------------------------

// A flag grows from operation to operation, modulo 2^32, and within one: epoch, then what is sent, then how many
// pieces. The format lies below the epoch, where it does not disturb the order: all flags of one epoch should have the
// same.
constexpr u64 ep_flag(u64 epoch, u32 format, u32 count) { return epoch << 32 | u64(format) << 24 | count; }
constexpr u32 ep_flag_format(u64 flag) { return u32(flag) >> 24; }
constexpr u64 ep_flag_epoch(u64 flag) { return flag >> 32; }
constexpr u32 ep_flag_count(u64 flag) { return u32(flag) & 0xffffffu; }

enum EpFormat : u32 { kEpRouting = 1, kEpE4m3 = 2, kEpBf16 = 3, kEpSums = 4, kEpSumsAndValues = 5, kEpQuantized = 6 };

// Where no flag is waited for, what 32 bits hold goes with its epoch in one word.
constexpr u64 ep_word(u64 epoch, u32 bits) { return epoch << 32 | bits; }

// Epochs are counted in 64 bits, of which flags and words hold the low 32: these begin again after 2^32 operations. A
// flag has come if it is ahead of what is wanted by no more than ranks can be, three operations. All else is old, even if
// by more than 2^31 operations: many flags are raised only if there are tokens for them. More room would let more flags
// that were never raised, which are zeros, pass for new ones when the count begins again.
constexpr u32 kEpMostAhead = 4;
constexpr u64 kEpOrder = ~(u64(0xff) << 24);  // all but the format
constexpr bool ep_flag_has_come(u64 seen, u64 wanted) {
  return u32(((seen & kEpOrder) - (wanted & kEpOrder)) >> 32) < kEpMostAhead;
}
constexpr bool ep_is_of(u64 flag_or_word, u64 epoch) { return u32(flag_or_word >> 32) == u32(epoch); }

// A choice: its number among those of the expert, and the expert. -1: none. Where "counted", the number is among the
// choices of its CTA, and the expert counted from the first of all; else among all of its source, and from the first of
// the rank.
constexpr int kEpRankShift = 12;
constexpr int kEpMaxCountedExperts = 1 << kEpRankShift, kEpMaxCountedChoices = 1 << (31 - kEpRankShift);
constexpr int ep_numbered_choice(int expert, int number) { return expert < 0 ? -1 : number << kEpRankShift | expert; }
constexpr int ep_choice_expert(int choice) { return choice < 0 ? -1 : choice & (kEpMaxCountedExperts - 1); }
constexpr int ep_choice_number(int choice) { return choice >> kEpRankShift; }

// --- the handle -----------------------------------------------------------------------------------------------------

// What dispatch leaves for those who follow, int32 words in memory of the caller.
struct EpHandleLayout {
  i64 num_tokens;  // [R]
  i64 offsets;     // [local experts + 1]: first rows; the last one is how many rows there are, whether they fit or not
  i64 counts;      // [local experts]: rows without padding
  i64 experts;     // [T][K]: this rank's own topk_idx, -1 where it is out of range
  i64 rows;        // [R][T][K]: the row of source s's token t for its choice k here, or kEpNotHere
  i64 row_tokens;  // [rows] where "counted": s * T + t of source s's token t, or kEpNotHere for padding
  i64 weights;     // [R][T][K] FP32
  i64 words;
};
constexpr int kEpNotHere = -1;

constexpr EpHandleLayout ep_handle_layout(const EpShape& s, int local_experts, int alignment) {
  const i64 choices = i64(s.max_tokens) * s.topk;
  EpHandleLayout l{};
  l.offsets = l.num_tokens + s.num_ranks;
  l.counts = l.offsets + local_experts + 1;
  l.experts = l.counts + local_experts;
  l.rows = l.experts + choices;
  l.row_tokens = l.rows + s.num_ranks * choices;
  l.weights = l.row_tokens + (s.counted ? s.num_ranks * choices + i64(local_experts) * (alignment - 1) : 0);
  l.words = l.weights + s.num_ranks * choices;
  return l;
}

// --- routing in shared memory ---------------------------------------------------------------------------------------

// int32 words. They fit into 32 bits where they fit into shared memory, and the kernel saves 64-bit arithmetic and
// divisions.
struct EpRouteSmem {
  // Of receivers.
  int total, before;    // [R][local experts]: choices in all; those before this CTA's tokens, then the first one's row
  int offsets, counts;  // [local experts + 1], [local experts]
  int num_tokens;       // [R]
  int ranges;           // EpRange [R]: this CTA's tokens
  // Of senders.
  int turned;  // [kEpTurnedTokens][kEpTurnedPitch] where "counted": scales on their way. At a multiple of 16 bytes
  int own;     // [choices of a CTA]
  int sent;    // [2][E], or where "counted" [routing warps][E]
  int seen;    // [R][words] where "counted": bits of this CTA's pieces whose flags have been seen
  // Of receivers, if there is room, else only the handle has them.
  int rows;  // [R][choices of a CTA]
  // What is between one and the next.
  int choices_per_cta, seen_words;
  i64 words;
};
constexpr int ep_num_receivers(const EpShape& s) { return s.num_ctas - s.num_senders; }
constexpr int ep_tokens_per_cta(const EpShape& s) { return ceil_div(s.max_tokens, ep_num_receivers(s)); }
constexpr int ep_choices_per_cta(const EpShape& s) { return ep_tokens_per_cta(s) * s.topk; }

constexpr EpRouteSmem ep_route_smem(const EpShape& s, int local_experts) {
  // With more shared memory L1 has 28 KB, too few for the loads that are on their way.
  constexpr i64 kMaxRows = 8192, kMaxWords = (192 << 10) / 4;
  const i64 ranks = s.num_ranks, local = local_experts, choices = ep_choices_per_cta(s);
  EpRouteSmem l{};
  l.choices_per_cta = int(choices);
  l.seen_words = ceil_div(ep_tokens_per_cta(s) << s.log2_parts, 32);
  const auto take = [&](i64 words) {
    const i64 begin = l.words;
    l.words += words;
    return int(begin);
  };
  l.total = take(ranks * local);
  l.before = take(ranks * local);
  l.offsets = take(local + 1);
  l.counts = take(local);
  l.num_tokens = take(ranks);
  l.ranges = take(2 * ranks);
  l.words = ceil_div<i64>(l.words, 4) * 4;
  l.turned = take(s.counted ? kEpTurnedTokens * kEpTurnedPitch : 0);
  l.own = take(choices);
  l.sent = take((s.counted ? kEpRouteWarps : 2) * i64(s.num_experts));
  l.seen = take(s.counted ? ranks * l.seen_words : 0);
  const i64 rows = ranks * choices;
  l.rows = take(rows <= kMaxRows && l.words + rows <= kMaxWords ? rows : 0);
  return l;
}
constexpr i64 kEpMaxRouteSmemBytes = 48 << 10;  // of experts and sources alone
constexpr i64 kEpMaxSmemBytes = 224 << 10;

// --- who does what --------------------------------------------------------------------------------------------------

struct EpRange {
  int begin, end;
  constexpr int size() const { return end - begin; }
};
// The tokens of a source that CTA `cta` handles.
constexpr EpRange ep_tokens_of_cta(int num_tokens, int cta, const Divisor& ctas) {
  const int piece = ctas.up(num_tokens);
  const i64 begin = i64(piece) * cta;
  return {int(min_of<i64>(begin, num_tokens)), int(min_of<i64>(begin + piece, num_tokens))};
}
// What a half of a CTA of combine does: half of the tokens, or where they are few, half of each one's columns. There
// sums tell by themselves that they have come.
constexpr bool ep_sums_are_few(const EpShape& s) { return s.max_tokens <= 2 * s.num_ctas; }
constexpr EpRange ep_half(EpRange all, int half, int unit) {
  const int middle = all.begin + ceil_div(all.size(), 2 * unit) * unit;
  return half == 0 ? EpRange{all.begin, min_of(middle, all.end)} : EpRange{min_of(middle, all.end), all.end};
}
constexpr EpRange ep_tokens_of_half(const EpShape& s, int num_tokens, int cta, const Divisor& ctas, int half) {
  const EpRange tokens = ep_tokens_of_cta(num_tokens, cta, ctas);
  return ep_sums_are_few(s) ? tokens : ep_half(tokens, half, 1);
}
constexpr EpRange ep_bytes_of_half(const EpShape& s, int half) {
  const EpRange row{0, 2 * s.hidden};
  return ep_sums_are_few(s) ? ep_half(row, half, 16) : row;
}
// Some tokens, cut into pieces: a token's parts are neighbours.
struct EpPieces {
  EpRange tokens;
  int log2_parts;

  constexpr int count() const { return tokens.size() << log2_parts; }
  constexpr int token(int i) const { return tokens.begin + (i >> log2_parts); }
  constexpr int part(int i) const { return i & ((1 << log2_parts) - 1); }
};
constexpr EpPieces ep_pieces(const EpShape& s, EpRange tokens) { return {tokens, s.log2_parts}; }
constexpr EpRange ep_cols(const EpShape& s, int part) {
  const int blocks = ep_num_blocks(s.hidden);
  const int step = ((blocks + (1 << s.log2_parts) - 1) >> s.log2_parts) * kEpColumns, begin = part * step;
  return {min_of(begin, s.hidden), min_of(begin + step, s.hidden)};
}
// The rank that holds a global expert, or -1. Ranks hold [first[r], first[r + 1]).
constexpr int ep_rank_of(const int* first, int num_ranks, i64 expert) {
  if (expert < 0 || expert >= first[num_ranks]) return -1;
  int low = 0, high = num_ranks - 1;  // the last rank that begins at or before it: empty ranks are passed over
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= expert)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace phalanx
