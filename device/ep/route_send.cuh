// The sending half of routing; route.cuh says how.
#pragma once
#include "device/ep/route_state.cuh"

namespace phalanx {

__device__ __forceinline__ u64* ep_words_at(const EpOperation& op, int rank, i64 region, i64 at) {
  return reinterpret_cast<u64*>(op.buffer(rank, region)) + at;
}

// This rank's choice, and its weight, to every rank.
__device__ __noinline__ void ep_send_choice(const EpDispatchParams& p, u64 epoch, i64 buffer, i64 token, int k,
                                            int choice, float weight) {
  const EpCommon& c = p.c;
  const i64 at = ep_choice(c, c.rank, token) + k;
#pragma unroll 1
  for (int r = 0; r < c.shape.num_ranks; ++r) {
    u8* to = c.peers[r] + buffer + at * 8;
    ptx::store_relaxed_sys(reinterpret_cast<u64*>(to + c.layout.choices), ep_word(epoch, u32(choice)));
    ptx::store_relaxed_sys(reinterpret_cast<u64*>(to + c.layout.weights), ep_word(epoch, __float_as_uint(weight)));
  }
}

// Numbers choices, [tokens][topk] experts or below 0, in order: next[e] is the next choice's number of e. Writes -1
// where there is no choice, and without `numbers` nothing; these may lie where the experts do. By a warp.
__device__ __noinline__ void ep_number_choices(const int* experts, int num_tokens, int topk, int* next, int* numbers) {
  constexpr int kAhead = 4;  // tokens whose choices are loaded at once
  const int lane = threadIdx.x % 32;
  const u32 lower_lanes = (1u << lane) - 1;
#pragma unroll 1
  for (int t = 0; t < num_tokens; t += kAhead) {
    int expert[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      expert[j] = t + j < num_tokens && lane < topk ? experts[(t + j) * topk + lane] : -1;
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      const int e = expert[j];
      // A token may choose an expert twice: its lanes take numbers in order.
      const u32 same = __match_any_sync(0xffffffffu, e >= 0 ? e : -1 - lane);
      const int number = e >= 0 ? next[e] + __popc(same & lower_lanes) : -1;
      __syncwarp();
      if (e >= 0 && (same & lower_lanes) == 0) next[e] += __popc(same);
      __syncwarp();
      if (numbers && t + j < num_tokens && lane < topk) numbers[(t + j) * topk + lane] = number;
    }
  }
}

// Numbers this CTA's choices of each expert, into `numbers`, and sends how many there are.
__device__ __forceinline__ void ep_count_own_choices(const EpOperation& op, const EpRole& role,
                                                     const EpRouteState& state, const int* experts, int num_tokens,
                                                     int* numbers) {
  const EpCommon& c = op.c;
  const int topk = c.shape.topk, piece = ceil_div(num_tokens, role.num_warps);
  const int begin = min_of(role.warp() * piece, num_tokens), end = min_of(begin + piece, num_tokens);
  int* next = state.sent(role.warp());
#pragma unroll 1
  for (int e = threadIdx.x % 32; e < c.shape.num_experts; e += 32) next[e] = 0;
  role.sync();  // experts are written as well
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    ep_number_choices(experts + begin * topk, end - begin, topk, next, pass == 0 ? nullptr : numbers + begin * topk);
    role.sync();
    if (pass == 1) return;
#pragma unroll 1
    for (int e = role.thread(); e < c.shape.num_experts; e += role.num_threads()) {
      int sum = 0;
#pragma unroll 1
      for (int w = 0; w < role.num_warps; ++w) {
        const int count = state.sent(w)[e];
        state.sent(w)[e] = sum;
        sum += count;
      }
      const int r = ep_rank_of(c.first_expert, c.shape.num_ranks, e);
      const i64 cta = i64(c.rank) * c.shape.num_ctas + blockIdx.x;
      reinterpret_cast<int*>(op.buffer(r, c.layout.counts))[cta * c.shape.max_local_experts + e - c.first_expert[r]] =
          sum;
    }
    role.sync();
  }
}

// This CTA's tokens: their choices to the handle and to every rank.
__device__ __forceinline__ void ep_send_routing(const EpOperation& op, const EpRole& role, const EpRouteState& state) {
  const EpDispatchParams& p = state.p;
  const EpCommon& c = p.c;
  const int topk = c.shape.topk, rank = role.thread();
  const EpRange tokens = ep_tokens_of_cta(c.num_tokens, blockIdx.x, c.shape.num_ctas);
  if (blockIdx.x == 0 && rank < c.shape.num_ranks)
    ptx::store_relaxed_sys(ep_words_at(op, rank, c.layout.headers, c.rank),
                           ep_flag(op.epoch, kEpRouting, c.num_tokens));
  int* experts = c.handle + c.handle_layout.experts + i64(tokens.begin) * topk;
  // Where this CTA's receivers will put rows later, behind the flag of this one too.
  int* numbers = c.handle + c.handle_layout.rows + ep_choice(c, c.rank, tokens.begin);
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (int i = role.thread(); i < tokens.size() * topk; i += role.num_threads()) {
      const int token = i / topk, k = i - token * topk;
      // Asked for before the choice is waited for.
      const float weight = p.topk_weights ? p.topk_weights[(tokens.begin + token) * p.weights_stride + k] : 1.0f;
      if (pass == 0) experts[i] = ep_own_expert(p, tokens.begin + token, k);
      if (pass == 1 || !c.shape.counted)
        ep_send_choice(p, op.epoch, op.buffer_offset, tokens.begin + token, k,
                       pass == 0 ? experts[i] : ep_numbered_choice(experts[i], numbers[i]), weight);
    }
    if (!c.shape.counted) return;
    if (pass == 0) ep_count_own_choices(op, role, state, experts, tokens.size(), numbers);
  }
  role.sync();
  if (rank < c.shape.num_ranks) {
    ptx::fence_acq_rel_sys();
    ptx::store_relaxed_sys(op.word(rank, c.layout.route_flags, c.rank * c.shape.num_ctas + int(blockIdx.x)),
                           ep_flag(op.epoch, kEpRouting, 1));
  }
}

}  // namespace phalanx
