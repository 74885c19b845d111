// Dispatch: every token crosses to a rank once and becomes as many rows there as it has experts.
//
//   rows[row(s, t, k)] = x_s[t], for every source s, token t and choice k of an expert of this rank
//
//   sending warps   x[t], quantised if wanted ----------------> peers' token slots; with many tokens token flags
//                   rows, weights ----------------------------> the handle, row_weights
//   routing warps   topk_idx ---------------------------------> peers' choices, weights;   route flags
//                   choices --> rows of all tokens (route.cuh)
//   all warps       x[t] of this rank, then slots as they come --> rows
//                   (few tokens: this rank's by slots as well, which are faster to read than x is to quantise again)
//   sending warps   with many tokens, before: scales that x has --> peers;  scales --> rows, MN-major
//                   all read --> credits, behind which peers may send again into the same buffer
//
// With many tokens, x[t] is sent by CTAs that do nothing else, to one peer after the other: rank r to r + 1, r + 2,
// ..., and receives from r - 1, r - 2, ... So each link has one sender at a time.
#pragma once
#include "device/ep/dispatch_send.cuh"
#include "device/ep/route.cuh"

namespace phalanx {

// --- receiving ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void ep_write_padding(const EpDispatchParams& p, const EpRole& role,
                                                 const EpRouteState& state) {
  const int lane = threadIdx.x % 32, hidden = p.c.shape.hidden, size = p.format == kEpE4m3 ? 1 : 2;
#pragma unroll 1
  for (int e = blockIdx.x; e < ep_num_local_experts(p.c); e += ep_num_receivers(p.c.shape)) {
    const int end = min_of(state.offsets()[e + 1], p.capacity);
#pragma unroll 1
    for (i64 row = state.offsets()[e] + state.counts()[e] + role.warp(); row < end; row += role.num_warps) {
      u8* data = static_cast<u8*>(p.rows) + row * p.row_stride * size;
#pragma unroll 1
      for (int at = lane * 16; at < hidden * size; at += 32 * 16) *reinterpret_cast<EpVector*>(data + at) = {};
#pragma unroll 1
      for (int b = lane; p.row_scales && b < ep_num_blocks(hidden); b += 32)
        p.row_scales[row + b * p.row_scale_stride] = 1;
      if (p.row_weights && lane == 0) p.row_weights[row] = 0;
    }
  }
}

// Until piece i of a source's `count` is here. What one warp has seen of the flags, all know, and it looks at the
// neighbours' as well. By a warp.
__device__ __noinline__ bool ep_await_piece(const EpCommon& c, int source, const u64* flags, int count, int i,
                                            u64 wanted, int* all_seen) {
  const int lane = threadIdx.x % 32, neighbour = i - i % 32 + lane;
  int* seen = all_seen + i / 32;
  bool fine = true;
  if ((__shfl_sync(0xffffffffu, u32(ep_look(*seen)), 0) >> i % 32 & 1) == 0) {
    const u32 up = __ballot_sync(0xffffffffu, neighbour < count && ptx::load_acquire_sys(flags + neighbour) == wanted);
    if ((up >> i % 32 & 1) == 0) fine = ep_wait(c, kEpPhaseTokens, source, flags + i, wanted);
    __syncwarp();
    ptx::fence_acq_rel_cta();
    if (lane == 0) atomicOr(seen, int(up));
  }
  ptx::fence_acq_rel_cta();
  __syncwarp();
  return __all_sync(0xffffffffu, fine);
}

// The routing warps have written shared.known, and the others wait for that.
__device__ __forceinline__ void ep_say_routing() { ptx::named_barrier_arrive(kEpKnown, 32 * kEpDispatchWarps); }
__device__ __forceinline__ bool ep_await_routing(const EpShared& shared) {
  ptx::named_barrier_sync(kEpKnown, 32 * kEpDispatchWarps);
  return ep_look(shared.known) != 0;
}

// Piece i of a source's tokens of this CTA, to its rows. By a warp.
template <bool kCounted>
__device__ __forceinline__ bool ep_receive_piece(const EpDispatchParams& p, const EpOperation& op,
                                                 const EpRouteState& state, const EpPieces& pieces, int source, int i) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32, size = p.format == kEpE4m3 ? 1 : 2;
  const int token = pieces.token(i), number = token - pieces.tokens.begin;
  const EpRange cols = ep_cols(c.shape, pieces.part(i));
  const int row = lane < c.shape.topk ? state.rows(source)[number * c.shape.topk + lane] : kEpNotHere;
  const EpTargets to = ep_rows(p, row);
  if (kCounted && source == c.rank) {
    if (to.lanes != 0) ep_move_own<kCounted>(p, token, cols, to);
    return true;
  }
  u8* slot = ep_dispatch_slot<kCounted>(op, c.rank, source, token);
  const bool has_scales = size == 1 && !(kCounted && ep_has_scales(p));
  float* scales = has_scales ? ep_token_scales<kCounted>(op, c.rank, source, token) : nullptr;
  const u64 is_here = ep_flag(op.epoch, p.sent, 1);
  if constexpr (kCounted) {
    if (to.lanes == 0) return true;
    const u64* flags = ep_piece_flag(op, c.rank, source, pieces.tokens.begin, 0);
    return ep_await_piece(c, source, flags, pieces.count(), i, is_here, state.seen(source)) &&
           ep_copy<kCounted>(EpRow{slot, scales, 1}, cols, size, to);
  } else {
    // What has no room is read as well: the slot must be empty.
    return !__any_sync(0xffffffffu, row != kEpNotHere) ||
           ep_copy<kCounted>(EpAwaitedRow{c, source, is_here, slot, scales}, cols, size, to);
  }
}

// Many tokens: scales that have come apart from them, to rows. Not to those of this CTA's tokens, which lie here and
// there, but to neighbouring ones: parts of lines cost memory several times as much as whole ones (docs/tuning.md). By
// a role.
__device__ __forceinline__ void ep_write_scales(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                const EpRouteState& state, int* failed) {
  const EpCommon& c = p.c;
  const int receivers = ep_num_receivers(c.shape);
  bool fine = true;
#pragma unroll 1
  for (int i = role.thread(); fine && i < (c.shape.num_ranks + p.route) * receivers; i += role.num_threads()) {
    const int source = c.by.receivers.of(i), cta = i - source * receivers;
    const bool of_rows = source == c.shape.num_ranks;  // behind all ranks; with a handle their tokens are known
    fine = ep_wait(c, kEpPhaseTokens, of_rows ? c.rank : source,
                   of_rows ? op.word(c.rank, c.layout.row_flags, cta)
                           : op.word(c.rank, c.layout.scale_flags, source * c.shape.num_ctas + cta),
                   ep_flag(op.epoch, of_rows ? kEpRouting : p.sent, 1));
  }
  if (!role.all(fine, failed)) return;
  const int end = min_of(state.offsets()[ep_num_local_experts(c)], p.capacity), blocks = ep_num_blocks(c.shape.hidden);
  const int* row_tokens = c.handle + c.handle_layout.row_tokens;
#pragma unroll 1
  for (int first = 32 * (int(blockIdx.x) + receivers * role.warp()); first < end;
       first += 32 * receivers * role.num_warps) {
    const int row = first + int(threadIdx.x) % 32, origin = row < end ? row_tokens[row] : kEpNotHere;
    if (origin == kEpNotHere) continue;
    const int source = c.by.max_tokens.of(origin);
    const EpVector* from = reinterpret_cast<const EpVector*>(
        ep_token_scales<true>(op, c.rank, source, origin - source * c.shape.max_tokens));
    ep_load_ahead(
        0, 1, ceil_div(blocks, 4), [&](int i) { return from[i]; },
        [&](int i, const EpVector& v) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (i * 4 + j < blocks) p.row_scales[row + (i * 4 + j) * p.row_scale_stride] = __uint_as_float(v.word[j]);
        });
  }
}

// This CTA's tokens of all sources, its own first: the others' are on their way meanwhile. All warps take pieces.
template <bool kCounted>
__device__ __forceinline__ void ep_receive_tokens(const EpDispatchParams& p, const EpOperation& op,
                                                  const EpRouteState& state, EpShared& shared) {
  const EpShape& shape = p.c.shape;
  int source = p.c.rank, turn = 0, begin = 0;
  EpPieces pieces = ep_pieces(shape, state.range(source));
#pragma unroll 1
  while (!__any_sync(0xffffffffu, ep_look(shared.failed))) {
    const int taken = ep_take(&shared.next);
#pragma unroll 1
    while (taken - begin >= pieces.count()) {
      if (++turn == shape.num_ranks) return;
      begin += pieces.count();
      source = source == 0 ? shape.num_ranks - 1 : source - 1;  // in the order in which they send
      pieces = ep_pieces(shape, state.range(source));
    }
    if (!ep_receive_piece<kCounted>(p, op, state, pieces, source, taken - begin)) shared.failed = 1;
  }
}

// kCounted: what the shape says.
template <bool kCounted>
__device__ __forceinline__ void ep_dispatch(const EpDispatchParams& p) {
  extern __shared__ __align__(128) u8 smem_base[];  // EpRouteSmem
  __shared__ EpShared shared;
  const EpCommon& c = p.c;
  const EpRouteState state{p, reinterpret_cast<int*>(smem_base)};
  if (threadIdx.x == 0) shared = {};
  if constexpr (kCounted) {
#pragma unroll 1
    for (int i = threadIdx.x; i < c.shape.num_ranks * p.smem.seen_words; i += 32 * kEpDispatchWarps)
      state.seen(0)[i] = 0;
  } else {
    ep_clear_counts(state);
  }
  __syncthreads();
  ptx::grid_wait_dependencies();
  const EpOperation send(c, kEpDispatchSend), recv(c, kEpDispatchRecv);
  const bool only_sends = kCounted && int(blockIdx.x) >= ep_num_receivers(c.shape), receives = c.recv && !only_sends;
  if (!p.route) {  // the handle may not have been written if the dispatch before has failed
    const bool may = threadIdx.x != 0 || ep_may_begin(send, recv, kEpPhaseTokens, receives, ep_stop_word(c));
    if (!ptx::named_barrier_all(0, 32 * kEpDispatchWarps, may) || !ep_fits_handle(c, kEpPhaseTokens)) return;
  }
  const bool routes = c.send && (p.route || !kCounted) && !only_sends;  // there is a header, be it only that
  const EpRole sender{kEpSenders, 0, only_sends ? kEpDispatchWarps : kEpSendWarps};
  const EpRole router{kEpRouters, kEpSendWarps, kEpRouteWarps}, first_half{kEpSenders, 0, kEpSendWarps};
  const auto keep = [&](const EpRole& keeper, const EpRole& publisher) {
    if (keeper.has_this_warp() && !ep_keep_rows<kCounted>(p, recv, keeper, state)) shared.failed = 1;
    if (publisher.has_this_warp() && blockIdx.x == 0) ep_publish_routing(p, publisher, state);
  };
  bool known = false;  // the same in all threads
  if (int(threadIdx.x) < sender.num_threads()) {
    if (!kCounted && c.send && p.copy) ep_prefetch_tokens(p, sender);
    const bool gives_credits = threadIdx.x < 32 && !only_sends;
    // Who only sends may wait for what this very kernel gives, and has stored nothing yet.
    if (gives_credits && !c.recv) ep_give_late_credits(recv, c.layout.dispatch_credit);
    const bool sends = c.send && p.copy && (only_sends || ep_all_send(p));
    const bool sends_scales = kCounted && c.send && !only_sends && ep_has_scales(p);
    const bool may_send =
        (sends || sends_scales || routes) && ep_may_send(send, recv, receives, sender, &shared.failed);
    if (routes) ptx::named_barrier_arrive(kEpMaySend, 32 * kEpDispatchWarps);
    if (sends_scales && may_send) ep_send_scales(p, send, sender, state.turned());
    if (sends && may_send) ep_send_tokens<kCounted>(p, send, sender, only_sends);
    if (receives) known = ep_await_routing(shared);
    // Else not before: a release waits for what has been sent, and all would wait for this warp.
    if (gives_credits && c.recv) ep_give_late_credits(recv, c.layout.dispatch_credit);
    if constexpr (kCounted) {
      if (known) keep(first_half, first_half);
      if (known && ep_has_scales(p)) ep_write_scales(p, recv, first_half, state, &shared.failed);
    }
  } else {
    if (routes) ep_send_routing<kCounted>(p, send, router, state, &shared.failed);
    if (receives) {
      known = ep_receive_routing<kCounted>(p, recv, router, state, shared);
      ep_say_routing();
      if (known && p.copy) ep_write_padding(p, router, state);
      // With few tokens it takes as long to keep a token's rows as to write them: not all warps do.
      if (!kCounted && known)
        keep({kEpRouters, kEpSendWarps, c.by.groups.value}, {kEpRouters, kEpDispatchWarps - 1, 1});
    }
  }
  if (known && p.copy) ep_receive_tokens<kCounted>(p, recv, state, shared);
  __syncthreads();
  ptx::grid_launch_dependents();  // not before: ranks may share a GPU, and what waits for a peer must not be in its way
  if (ep_look(shared.failed) != 0) return;
  if (c.send) ep_finish_send(send);
  if (receives) ep_finish_recv(recv, c.layout.dispatch_credit);
}

}  // namespace phalanx
