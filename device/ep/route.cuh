// Routing: every rank sends its topk_idx to all, itself included; each CTA then finds its rows for itself. So CTAs of a
// GPU need not wait for each other, but to write the scales of many tokens.
//
//   row(s, t, k) = first row of the expert + its choices by sources before s + its choices by tokens of s before t
//
//   few tokens ("latency"): a sender's CTA counts all of its rank's choices, and so numbers its own of each expert. They
//                           and the totals come with their epoch, a word each.
//   many ("counted"):       a sender's CTA numbers its choices of each expert, and sends how many there are behind a flag.
//                           Receivers add up the CTAs before it, and that number.
#pragma once
#include "device/ep/route_send.cuh"

namespace phalanx {

// --- receiving: where each expert's rows begin -----------------------------------------------------------------------

// Exclusive prefix sums of what taken(e) is of each expert: first(e, sum). Returns the whole sum. By the whole role.
template <class Taken, class First>
__device__ __forceinline__ int ep_scan_experts(const EpRole& role, int* warp_sums, int num_experts, Taken taken,
                                               First first) {
  const int lane = threadIdx.x % 32;
  int total = 0;
#pragma unroll 1
  for (int begin = 0; begin < num_experts; begin += role.num_threads()) {
    const int e = begin + role.thread(), mine = e < num_experts ? taken(e) : 0;
    int sum = mine;  // of the lanes up to this one
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int lower = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += lower;
    }
    if (lane == 31) warp_sums[role.warp()] = sum;
    role.sync();
    int before = total + sum - mine;
#pragma unroll
    for (int w = 0; w < kEpRouteWarps; ++w) {
      before += w < role.warp() ? warp_sums[w] : 0;
      total += warp_sums[w];
    }
    if (e < num_experts) first(e, before);
    role.sync();
  }
  return total;
}

// By one thread: the word, when it is of this epoch; of another if it did not come.
__device__ __noinline__ u64 ep_wait_for_word(const EpCommon& c, u64 epoch, int peer, const u64* word) {
  EpPatience patience(c, kEpPhaseRouting, peer, ep_word(epoch, 0));
#pragma unroll 1
  for (;;) {
    const u64 seen = ptx::load_relaxed_sys(word);
    if (ep_is_of(seen, epoch) || !patience.lasts(seen)) return seen;
  }
}

// By one thread: how many tokens the source has, by its header, and sends of them what this rank expects. Below 0: it
// does not.
__device__ __forceinline__ int ep_tokens_of(const EpDispatchParams& p, const EpOperation& op, int source, u64 header) {
  if (ep_flag_format(header) == p.sent) return ep_flag_count(header);
  ep_record(p.c, kEpMismatch, kEpPhaseRouting, source, ep_flag(op.epoch, p.sent, 0), header, 0);
  return -1;
}

// The same, when the header has come. Below 0 also if it has not.
__device__ __forceinline__ int ep_wait_for_header(const EpDispatchParams& p, const EpOperation& op, int source) {
  const EpCommon& c = p.c;
  const u64 seen = ep_wait_for_word(c, op.epoch, source, ep_words_at(op, c.rank, c.layout.headers, source));
  return ep_is_of(seen, op.epoch) ? ep_tokens_of(p, op, source, seen) : -1;
}

// Few tokens: how many choices of each expert every source has, and the choices of this CTA's tokens, into the place of
// their rows.
__device__ __forceinline__ bool ep_wait_for_choices(const EpDispatchParams& p, const EpOperation& op,
                                                    const EpRole& role, const EpRouteState& state) {
  const EpCommon& c = p.c;
  const int num_ranks = c.shape.num_ranks, num_local = ep_num_local_experts(c), half = role.num_threads() / 2;
  bool fine = true;
  if (role.thread() < half) {
    const u64* totals = ep_words_at(op, c.rank, c.layout.counts, 0);
    const auto word = [&](int i) {
      const int s = c.by.local_experts.of(i);
      return totals + s * c.shape.max_local_experts + (i - s * num_local);
    };
    ep_load_ahead(
        role.thread(), half, num_ranks * num_local, [&](int i) { return ptx::load_relaxed_sys(word(i)); },
        [&](int i, u64 seen) {
          if (fine && !ep_is_of(seen, op.epoch))
            seen = ep_wait_for_word(c, op.epoch, c.by.local_experts.of(i), word(i));
          fine = fine && ep_is_of(seen, op.epoch);
          state.total(0)[i] = int(u32(seen));
          state.before(0)[i] = 0;
        });
    return fine;
  }
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int s = (role.thread() - half) / 32; fine && s < num_ranks; s += half / 32) {
    const int num_tokens = ep_wait_for_header(p, op, s);
    fine = __all_sync(0xffffffffu, num_tokens >= 0);
    if (lane == 0) state.set_num_tokens(s, fine ? num_tokens : 0);
    __syncwarp();
    const EpRange tokens = state.range(s);
#pragma unroll 1
    for (int i = lane; fine && i < tokens.size() * c.shape.topk; i += 32) {
      const i64 at = ep_choice(c, s, tokens.begin) + i;
      const u64 seen = ep_wait_for_word(c, op.epoch, s, ep_words_at(op, c.rank, c.layout.choices, at));
      fine = ep_is_of(seen, op.epoch);
      state.rows(s)[i] = int(u32(seen));
    }
    fine = __all_sync(0xffffffffu, fine);
  }
  return fine;
}

// Many tokens: total and before from the counts of the senders' CTAs, each behind its flag.
__device__ __forceinline__ bool ep_add_counts(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                              const EpRouteState& state, EpShared& shared) {
  const EpCommon& c = p.c;
  const int num_local = ep_num_local_experts(c), num_ctas = c.shape.num_ctas, num_receivers = ep_num_receivers(c.shape);
  bool fine = true;
#pragma unroll 1
  for (int i = role.thread(); fine && i < c.shape.num_ranks * num_receivers; i += role.num_threads()) {
    const int source = c.by.receivers.of(i), cta = i - source * num_receivers;
    fine = ep_wait(op.c, kEpPhaseRouting, source, op.word(c.rank, c.layout.route_flags, source * num_ctas + cta),
                   ep_flag(op.epoch, kEpRouting, 1));
  }
  if (!role.all(fine, &shared.failed)) return false;
  if (const int s = role.thread(); s < c.shape.num_ranks) {
    const int tokens = ep_tokens_of(p, op, s, ptx::load_relaxed_sys(ep_words_at(op, c.rank, c.layout.headers, s)));
    fine = tokens >= 0;
    state.set_num_tokens(s, fine ? tokens : 0);
  }
  const int* counts = reinterpret_cast<const int*>(op.buffer(c.rank, c.layout.counts));
#pragma unroll 1
  for (int i = role.thread(); i < c.shape.num_ranks * num_local; i += role.num_threads()) {
    const int source = c.by.local_experts.of(i), e = i - source * num_local;
    const int* column = counts + i64(source) * num_ctas * c.shape.max_local_experts + e;
    int total = 0, before = 0;
    ep_load_ahead<16>(
        0, 1, num_receivers, [&](int cta) { return column[u32(cta) * u32(c.shape.max_local_experts)]; },
        [&](int cta, int count) {
          total += count;
          before += cta < int(blockIdx.x) ? count : 0;
        });
    state.total(0)[i] = total;
    state.before(0)[i] = before;
  }
  return fine;
}

// First rows of the experts; `before` becomes the row of this CTA's first choice.
template <bool kCounted>
__device__ __forceinline__ bool ep_place_experts(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                 const EpRouteState& state, EpShared& shared) {
  const EpCommon& c = p.c;
  const int num_local = ep_num_local_experts(c), num_ranks = c.shape.num_ranks;
  bool fine;
  if constexpr (kCounted)
    fine = ep_add_counts(p, op, role, state, shared);
  else
    fine = ep_wait_for_choices(p, op, role, state);
  if (!role.all(fine, &shared.failed)) return false;
  const auto count = [&](int e) {
    int sum = 0;
#pragma unroll 2
    for (int s = 0; s < num_ranks; ++s) sum += state.total(s)[e];
    return sum;
  };
  const auto taken = [&](int e) { return p.alignment.up(count(e)) * p.alignment.value; };
  const int rows = ep_scan_experts(role, shared.warp_sums, num_local, taken, [&](int e, int first) {
    state.offsets()[e] = first;
    state.counts()[e] = count(e);
#pragma unroll 2
    for (int s = 0; s < num_ranks; ++s) {
      state.before(s)[e] += first;
      first += state.total(s)[e];
    }
  });
  if (role.thread() == 0) state.offsets()[num_local] = rows;
  role.sync();
  return true;
}

// --- receiving: the rows of this CTA's tokens ------------------------------------------------------------------------

// Few tokens: numbered choices become rows.
__device__ __forceinline__ void ep_number_rows(const EpRole& role, const EpRouteState& state) {
  const EpShape& shape = state.p.c.shape;
  const EpShare share(role, state.p.c.by.groups);
#pragma unroll 1
  for (int s = share.source; s < shape.num_ranks; s += share.num_groups) {
    int* rows = state.rows(s);
#pragma unroll 1
    for (int i = share.first; i < state.range(s).size() * shape.topk; i += share.step)
      if (rows[i] != kEpNotHere) rows[i] = state.before(s)[ep_choice_expert(rows[i])] + ep_choice_number(rows[i]);
  }
}

// Many tokens: rows from the choices, their numbers, and the rows of the CTA's first ones; and the tokens of rows,
// which other CTAs wait for.
__device__ __forceinline__ void ep_find_rows(const EpOperation& op, const EpRole& role, const EpRouteState& state) {
  const EpCommon& c = op.c;
  const int num_local = ep_num_local_experts(c), first_expert = c.first_expert[c.rank];
  int* row_tokens = c.handle + c.handle_layout.row_tokens;
  const EpShare share(role, c.by.groups);
#pragma unroll 1
  for (int s = share.source; s < c.shape.num_ranks; s += share.num_groups) {
    const EpRange tokens = state.range(s);
    const int num_choices = tokens.size() * c.shape.topk;
    const i64 base = ep_choice(c, s, tokens.begin);
    int* rows = state.rows(s);
    ep_load_ahead(
        share.first, share.step, num_choices,
        [&](int i) { return int(u32(ptx::load_relaxed_sys(ep_words_at(op, c.rank, c.layout.choices, base + i)))); },
        [&](int i, int choice) {
          const int e = ep_choice_expert(choice) - first_expert;
          const bool is_here = choice >= 0 && e >= 0 && e < num_local;
          rows[i] = is_here ? state.before(s)[e] + ep_choice_number(choice) : kEpNotHere;
          if (is_here) row_tokens[rows[i]] = s * c.shape.max_tokens + tokens.begin + c.by.topk.of(i);
        });
  }
#pragma unroll 1
  for (int e = blockIdx.x; e < num_local; e += ep_num_receivers(c.shape))
#pragma unroll 1
    for (int row = state.offsets()[e] + state.counts()[e] + role.thread(); row < state.offsets()[e + 1];
         row += role.num_threads())
      row_tokens[row] = kEpNotHere;
  role.sync();
  if (role.thread() == 0)
    ptx::store_release_sys(op.word(c.rank, c.layout.row_flags, int(blockIdx.x)), ep_flag(op.epoch, kEpRouting, 1));
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
  role.sync();
  const EpShare share(role, c.by.groups);
#pragma unroll 1
  for (int s = share.source; state.has_rows() && s < c.shape.num_ranks; s += share.num_groups) {
    const EpRange tokens = state.range(s);
    const int* kept = c.handle + c.handle_layout.rows + ep_choice(c, s, tokens.begin);
    int* rows = state.rows(s);
    ep_load_ahead(
        share.first, share.step, tokens.size() * c.shape.topk, [&](int i) { return kept[i]; },
        [&](int i, int row) { rows[i] = row; });
  }
}

// By the whole role: until the rows of this CTA's tokens are known, as `shared.known` then says. False if a peer did
// not come.
template <bool kCounted>
__device__ __forceinline__ bool ep_receive_routing(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                   const EpRouteState& state, EpShared& shared) {
  if (!p.route) {
    ep_recall_routing(p.c, role, state);
    if constexpr (!kCounted) {
      const int source = role.thread();
      const bool fine = source >= p.c.shape.num_ranks || ep_wait_for_header(p, op, source) >= 0;
      if (!role.all(fine, &shared.failed)) return false;
    }
  } else {
    if (!ep_place_experts<kCounted>(p, op, role, state, shared)) return false;
    if constexpr (kCounted)
      ep_find_rows(op, role, state);
    else
      ep_number_rows(role, state);
  }
  if (role.thread() == 0) shared.known = 1;
  role.sync();
  return true;
}

// --- keeping what was found, when there is time ----------------------------------------------------------------------

// Rows and weights of this CTA's tokens, to the handle and to row_weights.
template <bool kCounted>
__device__ __forceinline__ bool ep_keep_rows(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                             const EpRouteState& state) {
  const EpCommon& c = p.c;
  struct Kept {
    int row;
    u64 word;
  };
  const EpShare share(role, c.by.groups);
  const i64 words = kCounted ? c.layout.choices : c.layout.weights;
  bool fine = true;
#pragma unroll 1
  for (int s = share.source; s < c.shape.num_ranks; s += share.num_groups) {
    const EpRange tokens = state.range(s);
    const int* rows = state.rows(s);
    const i64 base = ep_choice(c, s, tokens.begin);
    int* handle_rows = c.handle + c.handle_layout.rows + base;
    float* weights = reinterpret_cast<float*>(c.handle + c.handle_layout.weights) + base;
    const u64* sent = ep_words_at(op, c.rank, words, base);
    ep_load_ahead<kCounted ? 4 : 1>(
        share.first, share.step, tokens.size() * c.shape.topk,
        [&](int i) {
          return Kept{rows[i], p.route ? ptx::load_relaxed_sys(sent + i) : u64(__float_as_uint(weights[i]))};
        },
        [&](int i, Kept kept) {
          if (!kCounted && p.route && !ep_is_of(kept.word, op.epoch)) {
            if (fine) kept.word = ep_wait_for_word(c, op.epoch, s, sent + i);
            fine = ep_is_of(kept.word, op.epoch);
          }
          const float weight = __uint_as_float(u32(kCounted && p.route ? kept.word >> 32 : kept.word));
          if (p.route) {
            handle_rows[i] = kept.row;
            weights[i] = weight;
          }
          if (p.row_weights && kept.row >= 0 && kept.row < p.capacity) p.row_weights[kept.row] = weight;
        });
  }
  return fine;
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

}  // namespace phalanx
