// Routing: every rank sends its topk_idx to all, itself included; each CTA then finds its rows for itself, so that CTAs
// of a GPU need not wait for each other.
//
//   row(s, t, k) = first row of the expert + its choices by sources before s + its choices by tokens of s before t
//
//   few tokens ("latency"): a choice comes with its epoch in one word. Every CTA waits for all of them and counts.
//   many ("counted"):       a sender's CTA numbers its choices of each expert, and sends how many there are behind a flag.
//                           Receivers add up the CTAs before it, and that number.
#pragma once
#include "device/ep/route_send.cuh"

namespace phalanx {

// --- receiving: where each expert's rows begin ------------------------------------------------------------------------

// Exclusive prefix sums of counts rounded up to the alignment, and the sum behind them. By one warp.
__device__ __forceinline__ void ep_scan_experts(int* offsets, const int* counts, int num_experts, int alignment) {
  const int lane = threadIdx.x % 32;
  int carry = 0;
#pragma unroll 1
  for (int first = 0; first < num_experts; first += 32) {
    const int e = first + lane;
    const int taken = e < num_experts ? ceil_div(counts[e], alignment) * alignment : 0;
    int sum = taken;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int lower = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += lower;
    }
    if (e < num_experts) offsets[e] = carry + sum - taken;
    carry += __shfl_sync(0xffffffffu, sum, 31);
  }
  if (lane == 0) offsets[num_experts] = carry;
}

// By one thread: until the word of this epoch is here.
__device__ __forceinline__ bool ep_wait_for_word(const EpOperation& op, int peer, const u64* word, u64& seen) {
  EpPatience patience(op.c, kEpPhaseRouting, peer, ep_word(op.epoch, 0));
#pragma unroll 1
  for (;;) {
    seen = ptx::load_relaxed_sys(word);
    if (ep_flag_epoch(seen) == op.epoch) return true;
    if (!patience.lasts(seen)) return false;
  }
}

// Few tokens: the choices of a source as they come, those of numbers `first`, first + step, ... They add up in total and
// before; those of this CTA's tokens become local experts, or kEpNotHere, in the place of their rows.
__device__ __forceinline__ bool ep_count_source(const EpOperation& op, const EpRouteState& state, int source, int first,
                                                int step) {
  constexpr int kAhead = 8;  // words that a thread waits for at once
  const EpCommon& c = op.c;
  const int num_local = ep_num_local_experts(c), topk = c.shape.topk;
  const u64* choices = ep_words_at(op, c.rank, c.layout.choices, ep_choice(c, source, 0));
  const u64* header = ep_words_at(op, c.rank, c.layout.headers, source);
  int num_choices = c.shape.max_tokens * topk;  // until the header says how many there are
#pragma unroll 1
  for (int i = first; i < num_choices; i += kAhead * step) {
    EpPatience patience(op.c, kEpPhaseRouting, source, ep_word(op.epoch, 0));
    u64 word[kAhead];
    for (bool is_missing = true; is_missing;) {
      const u64 head = ptx::load_relaxed_sys(header);
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        word[j] = i + j * step < num_choices ? ptx::load_relaxed_sys(choices + i + j * step) : 0;
      is_missing = ep_flag_epoch(head) != op.epoch;
      u64 seen = head;
      if (!is_missing) num_choices = int(ep_flag_count(head)) * topk;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j * step >= num_choices || ep_flag_epoch(word[j]) == op.epoch) continue;
        is_missing = true;
        seen = word[j];
      }
      if (is_missing && !patience.lasts(seen)) return false;
    }
    const EpRange mine = ep_tokens_of_cta(num_choices / topk, blockIdx.x, c.shape.num_ctas);
    int* rows =
        state.has_rows() ? state.rows(source) : c.handle + c.handle_layout.rows + ep_choice(c, source, mine.begin);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int number = i + j * step, choice = int(u32(word[j])), e = choice - c.first_expert[c.rank];
      if (number >= num_choices) continue;
      const bool is_here = choice >= 0 && e >= 0 && e < num_local;
      if (is_here) atomicAdd(&state.total(source)[e], 1);
      if (is_here && number < mine.begin * topk) atomicAdd(&state.before(source)[e], 1);
      if (number >= mine.begin * topk && number < mine.end * topk)
        rows[number - mine.begin * topk] = is_here ? e : kEpNotHere;
    }
  }
  if (first == 0) {
    // Where no token can be, nothing has been waited for.
    const u64 head = c.shape.max_tokens > 0 ? ptx::load_relaxed_sys(header) : 0;
    state.set_num_tokens(source, ep_flag_count(head));
  }
  return true;
}

// Of all sources, each by some of the warps.
__device__ __forceinline__ bool ep_count_choices(const EpOperation& op, const EpRole& role, const EpRouteState& state) {
  const int num_ranks = op.c.shape.num_ranks, num_local = ep_num_local_experts(op.c);
#pragma unroll 1
  for (int i = role.thread(); i < 2 * num_ranks * num_local; i += role.num_threads()) state.total(0)[i] = 0;
  role.sync();
  const int groups = min_of(num_ranks, role.num_warps), group = role.warp() % groups;
  const int first = role.warp() / groups * 32 + int(threadIdx.x) % 32;
  const int step = ceil_div(role.num_warps - group, groups) * 32;
  bool fine = true;
#pragma unroll 1
  for (int s = group; fine && s < num_ranks; s += groups) fine = ep_count_source(op, state, s, first, step);
  return fine;
}

// Many tokens: total and before from the counts of the senders' CTAs, each behind its flag.
__device__ __forceinline__ bool ep_add_counts(const EpOperation& op, const EpRole& role, const EpRouteState& state,
                                              int* vote) {
  const EpCommon& c = op.c;
  const int num_local = ep_num_local_experts(c), num_ctas = c.shape.num_ctas;
  bool fine = true;
#pragma unroll 1
  for (int i = role.thread(); fine && i < c.shape.num_ranks * num_ctas; i += role.num_threads())
    fine = ep_wait(op.c, kEpPhaseRouting, i / num_ctas, op.word(c.rank, c.layout.route_flags, i),
                   ep_flag(op.epoch, kEpRouting, 1));
  if (!role.all(fine, vote)) return false;
  if (const int s = role.thread(); s < c.shape.num_ranks)
    state.set_num_tokens(s, ep_flag_count(ptx::load_relaxed_sys(ep_words_at(op, c.rank, c.layout.headers, s))));
  const int* counts = reinterpret_cast<const int*>(op.buffer(c.rank, c.layout.counts));
#pragma unroll 1
  for (int i = role.thread(); i < c.shape.num_ranks * num_local; i += role.num_threads()) {
    const int source = i / num_local, e = i - source * num_local;
    const int* column = counts + i64(source) * num_ctas * c.shape.max_local_experts + e;
    int total = 0, before = 0;
#pragma unroll 8
    for (int cta = 0; cta < num_ctas; ++cta) {
      const int count = column[i64(cta) * c.shape.max_local_experts];
      total += count;
      before += cta < int(blockIdx.x) ? count : 0;
    }
    state.total(0)[i] = total;
    state.before(0)[i] = before;
    if (c.shape.staged) state.places(source)[e] = column[i64(blockIdx.x) * c.shape.max_local_experts];
  }
  return true;
}

// First rows of the experts; `before` becomes the row of this CTA's first choice, `places` its place.
__device__ __forceinline__ bool ep_place_experts(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                 const EpRouteState& state, int* vote) {
  const EpCommon& c = p.c;
  const int num_local = ep_num_local_experts(c), num_ranks = c.shape.num_ranks;
  const bool fine = c.shape.counted ? ep_add_counts(op, role, state, vote) : ep_count_choices(op, role, state);
  if (!role.all(fine, vote)) return false;
#pragma unroll 1
  for (int e = role.thread(); e < num_local; e += role.num_threads()) {
    int count = 0;
#pragma unroll 1
    for (int s = 0; s < num_ranks; ++s) count += state.total(s)[e];
    state.counts()[e] = count;
  }
  role.sync();
#pragma unroll 1
  for (int s = role.warp(); s <= (c.shape.staged ? num_ranks : 0); s += role.num_warps) {
    int* places = state.places(s - 1);
    ep_scan_experts(s == 0 ? state.offsets() : places, s == 0 ? state.counts() : places, num_local,
                    s == 0 ? p.alignment : 1);
  }
  role.sync();
#pragma unroll 1
  for (int e = role.thread(); e < num_local; e += role.num_threads()) {
    int base = state.offsets()[e];
#pragma unroll 1
    for (int s = 0; s < num_ranks; ++s) {
      state.before(s)[e] += base;
      base += state.total(s)[e];
    }
  }
  role.sync();
  return true;
}

// --- receiving: the rows of this CTA's tokens -------------------------------------------------------------------------

// Few tokens: local experts become rows. A warp takes a source, token by token.
__device__ __forceinline__ void ep_number_rows(const EpRole& role, const EpRouteState& state) {
  const EpShape& shape = state.p.c.shape;
#pragma unroll 1
  for (int s = role.warp(); s < shape.num_ranks; s += role.num_warps) {
    int* rows = state.rows(s);
    ep_number_choices(rows, state.range(s).size(), shape.topk, state.before(s), rows);
  }
}

// Many tokens: the row of a choice of source s, and its place among those of this CTA.
__device__ __forceinline__ int ep_row_of_choice(const EpOperation& op, const EpRouteState& state, int s, i64 at) {
  const EpCommon& c = op.c;
  const int num_local = ep_num_local_experts(c);
  const int choice = int(u32(ptx::load_relaxed_sys(ep_words_at(op, c.rank, c.layout.choices, at))));
  const int e = ep_choice_expert(choice) - c.first_expert[c.rank];
  const bool is_here = choice >= 0 && e >= 0 && e < num_local;
  if (c.shape.staged)
    c.handle[c.handle_layout.places + at] = is_here ? state.places(s)[e] + ep_choice_number(choice) : 0;
  return is_here ? state.before(s)[e] + ep_choice_number(choice) : kEpNotHere;
}

// Rows and weights of this CTA's tokens, to the handle and to where they are wanted.
__device__ __forceinline__ bool ep_keep_rows(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                             const EpRouteState& state) {
  const EpCommon& c = p.c;
  int* handle_rows = c.handle + c.handle_layout.rows;
  float* handle_weights = reinterpret_cast<float*>(c.handle + c.handle_layout.weights);
  bool fine = true;
#pragma unroll 1
  for (int s = 0; s < c.shape.num_ranks; ++s) {
    const EpRange tokens = state.range(s);
    int* rows = state.rows(s);
    const i64 base = ep_choice(c, s, tokens.begin);
#pragma unroll 1
    for (int i = role.thread(); fine && i < tokens.size() * c.shape.topk; i += role.num_threads()) {
      if (p.route) {
        const int row = c.shape.counted ? ep_row_of_choice(op, state, s, base + i) : rows[i];
        u64 weight;
        fine = ep_wait_for_word(op, s, ep_words_at(op, c.rank, c.layout.weights, base + i), weight);
        rows[i] = row;
        handle_rows[base + i] = row;
        handle_weights[base + i] = __uint_as_float(u32(weight));
      } else if (state.has_rows()) {
        rows[i] = handle_rows[base + i];
      }
      if (p.row_weights && rows[i] >= 0 && rows[i] < p.capacity) p.row_weights[rows[i]] = handle_weights[base + i];
    }
  }
  return fine;
}

// What the handle said at an earlier dispatch.
__device__ __forceinline__ void ep_recall_routing(const EpCommon& c, const EpRole& role, const EpRouteState& state) {
  const int num_local = ep_num_local_experts(c);
#pragma unroll 1
  for (int i = role.thread(); i <= num_local; i += role.num_threads()) {
    state.offsets()[i] = c.handle[c.handle_layout.offsets + i];
    if (i < num_local) state.counts()[i] = c.handle[c.handle_layout.counts + i];
  }
#pragma unroll 1
  for (int s = role.thread(); s < c.shape.num_ranks; s += role.num_threads())
    state.set_num_tokens(s, c.handle[c.handle_layout.num_tokens + s]);
}

// By the first CTA: what concerns all of them.
__device__ __forceinline__ void ep_publish_routing(const EpDispatchParams& p, const EpRole& role,
                                                   const EpRouteState& state) {
  const EpCommon& c = p.c;
  const int num_local = ep_num_local_experts(c);
#pragma unroll 1
  for (int i = role.thread(); i <= num_local; i += role.num_threads()) {
    if (p.route) c.handle[c.handle_layout.offsets + i] = state.offsets()[i];
    if (p.offsets) p.offsets[i] = state.offsets()[i];
    if (i == num_local) continue;
    if (p.route) c.handle[c.handle_layout.counts + i] = state.counts()[i];
    if (p.counts) p.counts[i] = state.counts()[i];
  }
  if (p.route)
#pragma unroll 1
    for (int s = role.thread(); s < c.shape.num_ranks; s += role.num_threads())
      c.handle[c.handle_layout.num_tokens + s] = state.num_tokens(s);
  if (p.copy && role.thread() == 0 && state.offsets()[num_local] > p.capacity) {
    c.status->rows_given = p.capacity;
    ptx::store_release_sys(&c.status->rows_needed, state.offsets()[num_local]);
  }
}

// By the whole role; false if a peer did not come. Afterwards the rows of this CTA's tokens are known.
__device__ __forceinline__ bool ep_receive_routing(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                   const EpRouteState& state, int* vote) {
  if (p.c.shape.staged && role.thread() == 0) state.num_staged() = 0;
  if (p.route) {
    if (!ep_place_experts(p, op, role, state, vote)) return false;
    if (!p.c.shape.counted) ep_number_rows(role, state);
  } else {
    ep_recall_routing(p.c, role, state);
  }
  role.sync();
  const bool fine = ep_keep_rows(p, op, role, state);
  if (blockIdx.x == 0) ep_publish_routing(p, role, state);
  return role.all(fine, vote);
}

}  // namespace phalanx
