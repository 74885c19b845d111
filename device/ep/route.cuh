// Routing: every rank sends its topk_idx to all, itself included; each CTA then counts for itself, so that CTAs of a
// GPU need not wait for each other.
//
//   row(s, t, k) = first row of the expert + its choices by sources before s + its choices by tokens of s before t
//
//   whole role:    total[s][e] = choices of e by source s, before[s][e] = those by tokens before this CTA's: sums of
//   what the
//                  senders' CTAs have counted, or, with few tokens, counts of all choices
//   one warp:      first rows, by a scan over the experts
//   whole role:    each warp takes neighbouring tokens, counts them, and then gives them rows in order, one choice a
//   lane
#pragma once
#include "device/ep/signal.cuh"

namespace phalanx {

struct EpRouteState {
  int *total, *before, *offsets, *counts, *num_tokens, *next;

  __device__ __forceinline__ EpRouteState(int* smem, const EpShape& shape, int local_experts) {
    const EpRouteSmem l = ep_route_smem(shape, local_experts);
    total = smem;
    before = smem + l.before;
    offsets = smem + l.offsets;
    counts = smem + l.counts;
    num_tokens = smem + l.num_tokens;
    next = smem + l.next;
  }
};

// This rank's choice, -1 if it is none.
__device__ __forceinline__ int ep_own_expert(const EpDispatchParams& p, i64 token, int k) {
  if (!p.route) return p.c.handle[p.c.handle_layout.experts + token * p.c.shape.topk + k];
  const i64 at = token * p.idx_stride + k;
  const i64 expert = p.idx_is_64 ? static_cast<const i64*>(p.topk_idx)[at] : static_cast<const int*>(p.topk_idx)[at];
  return expert < 0 || expert >= p.c.first_expert[p.c.shape.num_ranks] ? -1 : int(expert);
}

// This CTA's tokens: their choices to the handle and to every rank, what they add up to, and a flag behind.
__device__ __forceinline__ void ep_send_routing(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                int* smem) {
  const EpCommon& c = p.c;
  const int topk = c.shape.topk, num_ranks = c.shape.num_ranks;
  int* sent = smem + ep_route_smem(c.shape, ep_num_local_experts(c)).sent;
  if (c.shape.counted) {
    for (int e = role.thread(); e < c.shape.num_experts; e += role.num_threads()) sent[e] = 0;
    role.sync();
  }
  const EpRange tokens = ep_tokens_of_cta(c.num_tokens, blockIdx.x, c.shape.num_ctas);
  const i64 mine = ep_choice(c, c.rank, 0);
  for (int i = tokens.begin * topk + role.thread(); i < tokens.end * topk; i += role.num_threads()) {
    const int token = i / topk, k = i - token * topk;
    const int expert = ep_own_expert(p, token, k);
    const float weight = p.topk_weights ? p.topk_weights[token * p.weights_stride + k] : 1.0f;
    c.handle[c.handle_layout.experts + i] = expert;
    for (int r = 0; r < num_ranks; ++r) {
      reinterpret_cast<int*>(op.buffer(r, c.layout.experts))[mine + i] = expert;
      reinterpret_cast<float*>(op.buffer(r, c.layout.weights))[mine + i] = weight;
    }
    if (c.shape.counted && expert >= 0) atomicAdd(&sent[expert], 1);
  }
  const int rank = role.thread();
  if (blockIdx.x == 0 && rank < num_ranks)
    *reinterpret_cast<int*>(op.buffer(rank, c.layout.headers) + c.rank * 16) = c.num_tokens;
  role.sync();
  const i64 cta = i64(c.rank) * c.shape.num_ctas + blockIdx.x;
  if (c.shape.counted) {
    for (int e = role.thread(); e < c.shape.num_experts; e += role.num_threads()) {
      const int r = ep_rank_of(c.first_expert, num_ranks, e);
      reinterpret_cast<int*>(op.buffer(r, c.layout.counts))[cta * c.shape.max_local_experts + e - c.first_expert[r]] =
          sent[e];
    }
    role.sync();
  }
  if (rank < num_ranks) {
    ptx::fence_acq_rel_sys();
    ptx::store_relaxed_sys(op.word(rank, c.layout.route_flags, int(cta)), ep_flag(op.epoch, kEpRouting, 1));
  }
}

// Until every CTA of every rank has sent its choices.
__device__ __forceinline__ bool ep_wait_for_routing(const EpOperation& op, const EpRole& role, int* vote) {
  const EpCommon& c = op.c;
  bool fine = true;
  for (int i = role.thread(); fine && i < c.shape.num_ranks * c.shape.num_ctas; i += role.num_threads())
    fine = ep_wait(op, kEpPhaseRouting, i / c.shape.num_ctas, op.word(c.rank, c.layout.route_flags, i),
                   ep_flag(op.epoch, kEpRouting, 1));
  return role.all(fine, vote);
}

// Exclusive prefix sums of counts rounded up to the alignment, and the sum behind them. By one warp.
__device__ __forceinline__ void ep_scan_experts(int* offsets, const int* counts, int num_experts, int alignment) {
  const int lane = threadIdx.x % 32;
  int carry = 0;
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

// Choices of source s, as they have come.
__device__ __forceinline__ const int* ep_choices_of(const EpOperation& op, int source) {
  return reinterpret_cast<const int*>(op.buffer(op.c.rank, op.c.layout.experts)) + ep_choice(op.c, source, 0);
}

// total and before, from the counts of the senders' CTAs.
__device__ __forceinline__ void ep_add_counts(const EpOperation& op, const EpRole& role, const EpRouteState& state) {
  const EpCommon& c = op.c;
  const int num_local = ep_num_local_experts(c), num_ctas = c.shape.num_ctas;
  const int* counts = reinterpret_cast<const int*>(op.buffer(c.rank, c.layout.counts));
  for (int i = role.thread(); i < c.shape.num_ranks * num_local; i += role.num_threads()) {
    const int source = i / num_local, e = i - source * num_local;
    const int* column = counts + i64(source) * num_ctas * c.shape.max_local_experts + e;
    int total = 0, before = 0;
#pragma unroll 16
    for (int cta = 0; cta < num_ctas; ++cta) {
      const int count = column[i64(cta) * c.shape.max_local_experts];
      total += count;
      before += cta < int(blockIdx.x) ? count : 0;
    }
    state.total[i] = total;
    state.before[i] = before;
  }
}

// total and before, from all choices.
__device__ __forceinline__ void ep_count_choices(const EpOperation& op, const EpRole& role, const EpRouteState& state) {
  const EpCommon& c = op.c;
  const int first = c.first_expert[c.rank], num_local = ep_num_local_experts(c);
  for (int i = role.thread(); i < 2 * c.shape.num_ranks * num_local; i += role.num_threads()) state.total[i] = 0;
  role.sync();
  for (int s = 0; s < c.shape.num_ranks; ++s) {
    const int* choices = ep_choices_of(op, s);
    const int num_choices = state.num_tokens[s] * c.shape.topk;
    const int here = ep_tokens_of_cta(state.num_tokens[s], blockIdx.x, c.shape.num_ctas).begin * c.shape.topk;
#pragma unroll 4
    for (int i = role.thread(); i < num_choices; i += role.num_threads()) {
      const int e = choices[i] - first;
      if (e < 0 || e >= num_local) continue;
      atomicAdd(&state.total[s * num_local + e], 1);
      if (i < here) atomicAdd(&state.before[s * num_local + e], 1);
    }
  }
}

// First rows of the experts; `before` becomes the row of this CTA's first choice.
__device__ __forceinline__ void ep_place_experts(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                 const EpRouteState& state) {
  const EpCommon& c = p.c;
  const int num_local = ep_num_local_experts(c), num_ranks = c.shape.num_ranks;
  if (role.thread() < num_ranks)
    state.num_tokens[role.thread()] =
        *reinterpret_cast<const int*>(op.buffer(c.rank, c.layout.headers) + role.thread() * 16);
  role.sync();
  if (c.shape.counted)
    ep_add_counts(op, role, state);
  else
    ep_count_choices(op, role, state);
  role.sync();
  for (int e = role.thread(); e < num_local; e += role.num_threads()) {
    int count = 0;
    for (int s = 0; s < num_ranks; ++s) count += state.total[s * num_local + e];
    state.counts[e] = count;
  }
  role.sync();
  if (role.warp() == 0) ep_scan_experts(state.offsets, state.counts, num_local, p.alignment);
  role.sync();
  for (int e = role.thread(); e < num_local; e += role.num_threads()) {
    int base = state.offsets[e];
    for (int s = 0; s < num_ranks; ++s) {
      state.before[s * num_local + e] += base;
      base += state.total[s * num_local + e];
    }
  }
  role.sync();
}

// One warp gives rows to tokens in order; next[e] is the row of the next choice of e. Without `rows` it only counts.
__device__ __forceinline__ void ep_assign_range(const EpCommon& c, const int* choices, EpRange tokens, int* next,
                                                int* rows) {
  constexpr int kAhead = 4;  // tokens whose choices are loaded at once
  const int topk = c.shape.topk, lane = threadIdx.x % 32;
  const int first = c.first_expert[c.rank], num_local = ep_num_local_experts(c);
  const u32 lower_lanes = (1u << lane) - 1;
  for (int t = tokens.begin; t < tokens.end; t += kAhead) {
    int expert[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      expert[j] = t + j < tokens.end && lane < topk ? choices[(t + j) * topk + lane] - first : -1;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int e = expert[j];
      const bool valid = e >= 0 && e < num_local;
      // A token may choose an expert twice: its lanes take rows in order.
      const u32 same = __match_any_sync(0xffffffffu, valid ? e : -1 - lane);
      const int row = valid ? next[e] + __popc(same & lower_lanes) : kEpNotHere;
      __syncwarp();
      if (valid && (same & lower_lanes) == 0) next[e] += __popc(same);
      __syncwarp();
      if (rows && t + j < tokens.end && lane < topk) rows[(t + j) * topk + lane] = row;
    }
  }
}

// Rows and weights of this CTA's tokens, to the handle.
__device__ __forceinline__ void ep_assign_rows(const EpOperation& op, const EpRole& role, const EpRouteState& state) {
  const EpCommon& c = op.c;
  const int num_local = ep_num_local_experts(c);
  const float* weights = reinterpret_cast<const float*>(op.buffer(c.rank, c.layout.weights));
  for (int s = 0; s < c.shape.num_ranks; ++s) {
    const EpRange tokens = ep_tokens_of_cta(state.num_tokens[s], blockIdx.x, c.shape.num_ctas);
    const i64 base = ep_choice(c, s, 0);
    const int* choices = ep_choices_of(op, s);
    int* rows = c.handle + c.handle_layout.rows + base;
    for (int i = tokens.begin * c.shape.topk + role.thread(); i < tokens.end * c.shape.topk; i += role.num_threads())
      reinterpret_cast<float*>(c.handle + c.handle_layout.weights)[base + i] = weights[base + i];

    const int num_tokens = tokens.end - tokens.begin, piece = ceil_div(num_tokens, role.num_warps);
    const EpRange mine{min_of(tokens.begin + role.warp() * piece, tokens.end),
                       min_of(tokens.begin + (role.warp() + 1) * piece, tokens.end)};
    if (num_tokens <= 4) {  // not worth the barriers
      if (role.warp() == s % role.num_warps) ep_assign_range(c, choices, tokens, state.before + s * num_local, rows);
      continue;
    }
    int* next = state.next + role.warp() * num_local;
    for (int e = threadIdx.x % 32; e < num_local; e += 32) next[e] = 0;
    __syncwarp();
    ep_assign_range(c, choices, mine, next, nullptr);
    role.sync();
    for (int e = role.thread(); e < num_local; e += role.num_threads()) {
      int row = state.before[s * num_local + e];
      for (int w = 0; w < role.num_warps; ++w) {
        const int count = state.next[w * num_local + e];
        state.next[w * num_local + e] = row;
        row += count;
      }
    }
    role.sync();
    ep_assign_range(c, choices, mine, next, rows);
    __syncwarp();
  }
}

// What the handle said at an earlier dispatch.
__device__ __forceinline__ void ep_recall_routing(const EpCommon& c, const EpRole& role, const EpRouteState& state) {
  const int num_local = ep_num_local_experts(c);
  for (int i = role.thread(); i <= num_local; i += role.num_threads()) {
    state.offsets[i] = c.handle[c.handle_layout.offsets + i];
    if (i < num_local) state.counts[i] = c.handle[c.handle_layout.counts + i];
  }
  for (int s = role.thread(); s < c.shape.num_ranks; s += role.num_threads())
    state.num_tokens[s] = c.handle[c.handle_layout.num_tokens + s];
}

// By the first CTA: what concerns all of them.
__device__ __forceinline__ void ep_publish_routing(const EpDispatchParams& p, const EpRole& role,
                                                   const EpRouteState& state) {
  const EpCommon& c = p.c;
  const int num_local = ep_num_local_experts(c);
  for (int i = role.thread(); i <= num_local; i += role.num_threads()) {
    if (p.route) c.handle[c.handle_layout.offsets + i] = state.offsets[i];
    if (p.offsets) p.offsets[i] = state.offsets[i];
    if (i == num_local) continue;
    if (p.route) c.handle[c.handle_layout.counts + i] = state.counts[i];
    if (p.counts) p.counts[i] = state.counts[i];
  }
  if (p.route)
    for (int s = role.thread(); s < c.shape.num_ranks; s += role.num_threads())
      c.handle[c.handle_layout.num_tokens + s] = state.num_tokens[s];
  if (p.copy && role.thread() == 0 && state.offsets[num_local] > p.capacity) {
    c.status->rows_given = p.capacity;
    ptx::store_release_sys(&c.status->rows_needed, state.offsets[num_local]);
  }
}

// By the whole role; false if a peer did not come. Afterwards the handle holds the rows of this CTA's tokens.
__device__ __forceinline__ bool ep_receive_routing(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                   const EpRouteState& state, int* vote) {
  if (p.route) {
    if (!ep_wait_for_routing(op, role, vote)) return false;
    ep_place_experts(p, op, role, state);
    ep_assign_rows(op, role, state);
  } else {
    ep_recall_routing(p.c, role, state);
  }
  role.sync();
  if (blockIdx.x == 0) ep_publish_routing(p, role, state);
  return true;
}

}  // namespace phalanx
