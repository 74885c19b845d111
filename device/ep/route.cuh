// Routing: every rank sends its topk_idx to all; each CTA then counts all of them for itself, so that CTAs need not wait for
// each other.
//
//   row(s, t, k) = first row of the expert + its choices by sources before s + its choices by tokens of s before t
//
//   whole role:  total[s][e] = choices of e by source s, before[s][e] = those by tokens before this CTA's; by shared atomics
//   one warp:    first rows, by a scan over the experts
//   a warp a source: its tokens of this CTA in order, one choice a lane
#pragma once
#include "device/ep/signal.cuh"

namespace phalanx {

struct EpRouteState {
  int *total, *before, *offsets, *counts, *num_tokens;

  __device__ __forceinline__ EpRouteState(int* smem, int num_ranks, int local_experts) {
    const EpRouteSmem l = ep_route_smem(num_ranks, local_experts);
    total = smem;
    before = smem + l.before;
    offsets = smem + l.offsets;
    counts = smem + l.counts;
    num_tokens = smem + l.num_tokens;
  }
};

__device__ __forceinline__ int ep_num_local_experts(const EpCommon& c) {
  return c.first_expert[c.rank + 1] - c.first_expert[c.rank];
}

// This rank's choice, -1 if it is none.
__device__ __forceinline__ int ep_own_expert(const EpDispatchParams& p, i64 token, int k) {
  if (!p.route) return p.c.handle[p.c.handle_layout.experts + token * p.c.shape.topk + k];
  const i64 at = token * p.idx_stride + k;
  const i64 expert = p.idx_is_64 ? static_cast<const i64*>(p.topk_idx)[at] : static_cast<const int*>(p.topk_idx)[at];
  return expert < 0 || expert >= p.c.first_expert[p.c.shape.num_ranks] ? -1 : int(expert);
}

// This CTA's tokens: their choices to the handle and to every peer, and a flag behind them.
__device__ __forceinline__ void ep_send_routing(const EpDispatchParams& p, const EpOperation& op, const EpRole& role) {
  const EpCommon& c = p.c;
  const int topk = c.shape.topk, num_ranks = c.shape.num_ranks;
  const EpRange tokens = ep_tokens_of_cta(c.num_tokens, blockIdx.x, c.shape.num_ctas);
  const i64 mine = ep_choice(c, c.rank, 0);
  for (int i = tokens.begin * topk + role.thread(); i < tokens.end * topk; i += role.num_threads()) {
    const int token = i / topk, k = i - token * topk;
    const int expert = ep_own_expert(p, token, k);
    const float weight = p.topk_weights ? p.topk_weights[token * p.weights_stride + k] : 1.0f;
    c.handle[c.handle_layout.experts + i] = expert;
    reinterpret_cast<float*>(c.handle + c.handle_layout.weights)[mine + i] = weight;
    for (int r = 0; r < num_ranks; ++r) {
      if (r == c.rank) continue;
      reinterpret_cast<int*>(op.buffer(r, c.layout.experts))[mine + i] = expert;
      reinterpret_cast<float*>(op.buffer(r, c.layout.weights))[mine + i] = weight;
    }
  }
  const int peer = role.thread();
  const bool is_peer = peer < num_ranks && peer != c.rank;
  if (blockIdx.x == 0 && is_peer)
    *reinterpret_cast<int*>(op.buffer(peer, c.layout.headers) + c.rank * 16) = c.num_tokens;
  role.sync();
  if (is_peer) {
    ptx::fence_acq_rel_sys();
    ptx::store_relaxed_sys(op.word(peer, c.layout.route_flags, c.rank * c.shape.num_ctas + blockIdx.x),
                           ep_flag(op.epoch, kEpRouting, 1));
  }
}

// Until every CTA of every peer has sent its choices.
__device__ __forceinline__ bool ep_wait_for_routing(const EpOperation& op, const EpRole& role, int* vote) {
  const EpCommon& c = op.c;
  bool fine = true;
  for (int i = role.thread(); fine && i < c.shape.num_ranks * c.shape.num_ctas; i += role.num_threads()) {
    const int peer = i / c.shape.num_ctas;
    if (peer != c.rank)
      fine = ep_wait(op, kEpPhaseRouting, peer, op.word(c.rank, c.layout.route_flags, i),
                     ep_flag(op.epoch, kEpRouting, 1));
  }
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

// Choices of source s: those that came, or this rank's own.
struct EpChoices {
  const EpDispatchParams& p;
  const int* theirs;
  bool mine;

  __device__ __forceinline__ EpChoices(const EpDispatchParams& params, const EpOperation& op, int source)
      : p(params),
        theirs(reinterpret_cast<const int*>(op.buffer(params.c.rank, params.c.layout.experts)) +
               ep_choice(params.c, source, 0)),
        mine(source == params.c.rank) {}
  // Of the choice i = token * K + k.
  __device__ __forceinline__ int expert(int i) const {
    if (!mine) return theirs[i];
    const int token = i / p.c.shape.topk;
    return ep_own_expert(p, token, i - token * p.c.shape.topk);
  }
};

__device__ __forceinline__ void ep_count_choices(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                 const EpRouteState& state) {
  const EpCommon& c = p.c;
  const int first = c.first_expert[c.rank], num_local = ep_num_local_experts(c), num_ranks = c.shape.num_ranks;
  if (role.thread() < num_ranks) {
    const int s = role.thread();
    state.num_tokens[s] =
        s == c.rank ? c.num_tokens : *reinterpret_cast<const int*>(op.buffer(c.rank, c.layout.headers) + s * 16);
  }
  for (int i = role.thread(); i < 2 * num_ranks * num_local; i += role.num_threads()) state.total[i] = 0;
  role.sync();
  for (int s = 0; s < num_ranks; ++s) {
    const EpChoices choices(p, op, s);
    const int num_choices = state.num_tokens[s] * c.shape.topk;
    const int here = ep_tokens_of_cta(state.num_tokens[s], blockIdx.x, c.shape.num_ctas).begin * c.shape.topk;
#pragma unroll 4
    for (int i = role.thread(); i < num_choices; i += role.num_threads()) {
      const int e = choices.expert(i) - first;
      if (e < 0 || e >= num_local) continue;
      atomicAdd(&state.total[s * num_local + e], 1);
      if (i < here) atomicAdd(&state.before[s * num_local + e], 1);
    }
  }
  role.sync();
  for (int e = role.thread(); e < num_local; e += role.num_threads()) {
    int count = 0;
    for (int s = 0; s < num_ranks; ++s) count += state.total[s * num_local + e];
    state.counts[e] = count;
  }
  role.sync();
  if (role.warp() == 0) ep_scan_experts(state.offsets, state.counts, num_local, p.alignment);
  role.sync();
  // `before` becomes the row of the next choice.
  for (int e = role.thread(); e < num_local; e += role.num_threads()) {
    int base = state.offsets[e];
    for (int s = 0; s < num_ranks; ++s) {
      state.before[s * num_local + e] += base;
      base += state.total[s * num_local + e];
    }
  }
  role.sync();
}

// Rows of this CTA's tokens, to the handle; and the peers' weights.
__device__ __forceinline__ void ep_assign_rows(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                               const EpRouteState& state) {
  const EpCommon& c = p.c;
  const int topk = c.shape.topk, lane = threadIdx.x % 32;
  const int first = c.first_expert[c.rank], num_local = ep_num_local_experts(c);
  const u32 lower_lanes = (1u << lane) - 1;
  const float* their_weights = reinterpret_cast<const float*>(op.buffer(c.rank, c.layout.weights));
  for (int s = role.warp(); s < c.shape.num_ranks; s += role.num_warps) {
    const EpChoices choices(p, op, s);
    const EpRange tokens = ep_tokens_of_cta(state.num_tokens[s], blockIdx.x, c.shape.num_ctas);
    int* next = state.before + s * num_local;
    int ahead = tokens.begin < tokens.end && lane < topk ? choices.expert(tokens.begin * topk + lane) : -1;
    for (int t = tokens.begin; t < tokens.end; ++t) {
      const int e = ahead - first;
      const bool valid = ahead >= 0 && e >= 0 && e < num_local;
      if (t + 1 < tokens.end && lane < topk) ahead = choices.expert((t + 1) * topk + lane);
      // A token may choose an expert twice: its lanes take rows in order.
      const u32 same = __match_any_sync(0xffffffffu, valid ? e : -1 - lane);
      const int row = valid ? next[e] + __popc(same & lower_lanes) : kEpNotHere;
      __syncwarp();
      if (valid && (same & lower_lanes) == 0) next[e] += __popc(same);
      __syncwarp();
      if (lane < topk) {
        const i64 at = ep_choice(c, s, t) + lane;
        c.handle[c.handle_layout.rows + at] = row;
        if (s != c.rank) reinterpret_cast<float*>(c.handle + c.handle_layout.weights)[at] = their_weights[at];
      }
    }
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
    ep_count_choices(p, op, role, state);
    ep_assign_rows(p, op, role, state);
  } else {
    ep_recall_routing(p.c, role, state);
  }
  role.sync();
  if (blockIdx.x == 0) ep_publish_routing(p, role, state);
  return true;
}

}  // namespace phalanx
