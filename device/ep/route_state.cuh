// What routing keeps in shared memory, and this rank's own choices.
#pragma once
#include "device/ep/signal.cuh"

namespace phalanx {

// Shared memory of a dispatch; see EpRouteSmem.
struct EpRouteState {
  const EpDispatchParams& p;
  int* smem;

  __device__ __forceinline__ int* total(int s) const { return smem + s * ep_num_local_experts(p.c); }
  __device__ __forceinline__ int* before(int s) const { return smem + p.smem.before + s * ep_num_local_experts(p.c); }
  __device__ __forceinline__ int* offsets() const { return smem + p.smem.offsets; }
  __device__ __forceinline__ int* counts() const { return smem + p.smem.counts; }
  __device__ __forceinline__ int& num_tokens(int s) const { return smem[p.smem.num_tokens + s]; }
  __device__ __forceinline__ EpRange& range(int s) const { return reinterpret_cast<EpRange*>(smem + p.smem.ranges)[s]; }
  __device__ __forceinline__ void set_num_tokens(int s, int count) const {
    num_tokens(s) = count;
    range(s) = ep_tokens_of_cta(count, blockIdx.x, p.c.by.receivers);
  }
  __device__ __forceinline__ bool has_rows() const { return p.smem.rows < p.smem.words; }
  // Of this CTA's tokens of a source.
  __device__ __forceinline__ int* rows(int s) const {
    if (has_rows()) return smem + p.smem.rows + s * p.smem.choices_per_cta;
    return p.c.handle + p.c.handle_layout.rows + ep_choice(p.c, s, range(s).begin);
  }
  __device__ __forceinline__ float* turned() const { return reinterpret_cast<float*>(smem + p.smem.turned); }
  __device__ __forceinline__ int* own() const { return smem + p.smem.own; }
  __device__ __forceinline__ int* sent(int warp) const { return smem + p.smem.sent + warp * p.c.shape.num_experts; }
  __device__ __forceinline__ int* seen(int s) const { return smem + p.smem.seen + s * p.smem.seen_words; }
};

// The named barriers of dispatch: all warps', two roles' own, and where one warp or role waits for others.
enum EpBarrier : int {
  kEpAllWarps,  // __syncthreads
  kEpSenders,
  kEpRouters,
  kEpMaySend,  // those that route, until the others know that all may send
  kEpKnown,    // the others, until rows are known
};

// What a CTA's warps share beside it. All 0 at the start.
struct EpShared {
  int failed;
  int known;  // not 0: where rows go
  int next;   // piece to be written
  int warp_sums[kEpRouteWarps];
};

// The warps of a role share sources: each takes the choices first, first + step, ... of source, source + num_groups,
// ...
struct EpShare {
  int source, num_groups, first, step;

  __device__ __forceinline__ EpShare(const EpRole& role, const Divisor& groups)
      : source(groups.rest(role.warp())),
        num_groups(groups.value),
        first(groups.of(role.warp()) * 32 + int(threadIdx.x) % 32),
        step(groups.up(role.num_warps - source) * 32) {}
};

// This rank's choice as it is stored, both halves of int64, or int32 twice. It is not looked at, and there is no
// branch, so that several can be on their way.
struct EpChoice {
  u32 low, high;
};
__device__ __forceinline__ EpChoice ep_load_choice(const EpDispatchParams& p, i64 token, int k) {
  const int words = p.route && p.idx_is_64 ? 2 : 1;
  const void* choices = p.route ? p.topk_idx : p.c.handle + p.c.handle_layout.experts;
  const i64 at = (token * (p.route ? p.idx_stride : p.c.shape.topk) + k) * words;
  return {static_cast<const u32*>(choices)[at], static_cast<const u32*>(choices)[at + words - 1]};
}
// Its expert, -1 if it is none.
__device__ __forceinline__ int ep_expert_of(const EpDispatchParams& p, EpChoice choice) {
  const u32 above = p.route && p.idx_is_64 ? choice.high : 0,
            end = above != 0 ? 0 : p.c.first_expert[p.c.shape.num_ranks];
  return choice.low < end ? int(choice.low) : -1;
}

// The slot at rank `at` for the token of rank `from`.
template <bool kCounted>
__device__ __forceinline__ u8* ep_dispatch_slot(const EpOperation& op, int at, int from, i64 token) {
  const EpCommon& c = op.c;
  const i64 source = kCounted ? ep_peer_idx(at, from) : from;
  return op.buffer(at, c.layout.tokens) + (source * c.shape.max_tokens + token) * c.layout.token_slot;
}

// The scales at rank `at` of that token of rank `from`.
template <bool kCounted>
__device__ __forceinline__ float* ep_token_scales(const EpOperation& op, int at, int from, i64 token) {
  const EpCommon& c = op.c;
  u8* scales = kCounted ? op.buffer(at, c.layout.scales) +
                              (i64(from) * c.shape.max_tokens + token) * ep_scale_bytes(c.shape.hidden)
                        : ep_dispatch_slot<kCounted>(op, at, from, token) + ep_scales_offset(c.shape.hidden);
  return reinterpret_cast<float*>(scales);
}

// By the whole role: until all peers have read what was sent before. False also if the operation may not begin.
__device__ __forceinline__ bool ep_may_send(const EpOperation& send, const EpOperation& recv, bool receives,
                                            const EpRole& role, int* failed) {
  const EpCommon& c = send.c;
  const u64 who = role.thread() == 0 ? ep_stop_word(c) : 0;
  const bool fine = ep_wait_for_credits(send, kEpPhaseDispatchCredit, c.layout.dispatch_credit, 0, c.by.receivers,
                                        role.thread(), role.num_threads());
  return role.all(fine && (role.thread() != 0 || ep_may_begin(send, recv, kEpPhaseTokens, receives, who)), failed);
}

}  // namespace phalanx
