// Dispatch: every token crosses to a rank once and becomes as many rows there as it has experts.
//
//   rows[row(s, t, k)] = x_s[t], for every source s, token t and choice k of an expert of this rank
//
//   sending warps   x[t], quantised if wanted ----------------> peers' token slots; with many tokens token flags
//                   rows, weights ----------------------------> the handle, row_weights
//   routing warps   topk_idx ---------------------------------> peers' choices, weights;   route flags
//                   choices --> rows of all tokens (route.cuh)
//   all warps       x[t] of this rank, then slots as they come --> rows; those that have sent: scales, MN-major
//                   (few tokens: this rank's by slots as well, which are faster to read than x is to quantise again)
//                   all read --> credits, behind which peers may send again into the same buffer
//
// With many tokens, x[t] is sent by CTAs that do nothing else, to one peer after the other: rank r to r + 1, r + 2, ...,
// and receives from r - 1, r - 2, ... So each link has one sender at a time, and a source's scales are written while
// the next one's tokens come.
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
      for (int b = lane; p.row_scales && b < ceil_div(hidden, kQuantizeBlock); b += 32)
        p.row_scales[row + b * p.row_scale_stride] = 1;
      if (p.row_weights && lane == 0) p.row_weights[row] = 0;
    }
  }
}

// Until the CTA has come so far, or has failed. `count` is shared memory that only grows. By one thread.
__device__ __forceinline__ void ep_wait_in_cta(const int* count, int wanted, const int* failed) {
  while (ep_look(*count) < wanted && ep_look(*failed) == 0) ptx::fence_acq_rel_cta();
  ptx::fence_acq_rel_cta();
}

// Until piece i of a source's `count` is here. What one warp has seen of the flags, all know, and it looks at the neighbours'
// as well. By a warp.
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
                                                 const EpRouteState& state, const EpPieces& pieces, int source,
                                                 int turn, int i) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32, size = p.format == kEpE4m3 ? 1 : 2;
  const int token = pieces.token(i), number = token - pieces.tokens.begin;
  const EpRange cols = ep_cols(c.shape, pieces.part(i));
  const int row = lane < c.shape.topk ? state.rows(source)[number * c.shape.topk + lane] : kEpNotHere;
  const EpTargets to = ep_rows(p, row, kCounted && c.shape.staged ? state.stage(turn, number) : nullptr);
  if (kCounted && source == c.rank) {
    if (to.lanes != 0) ep_move_own<kCounted>(p, token, cols, to);
    return true;
  }
  u8* slot = ep_dispatch_slot<kCounted>(op, c.rank, source, token);
  float* scales = size == 1 ? reinterpret_cast<float*>(slot + ep_scales_offset(c.shape.hidden)) : nullptr;
  const u64 is_here = ep_flag(op.epoch, p.format, 1);
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

// Staged scales to their rows, in the order of rows: neighbouring lanes write neighbouring words, one block at a time.
// By the whole role, when all pieces of the source have been written.
__device__ __forceinline__ void ep_write_staged_scales(const EpDispatchParams& p, const EpRole& role,
                                                       const EpRouteState& state, EpShared& shared, int source,
                                                       int turn) {
  const EpCommon& c = p.c;
  const EpRange tokens = state.range(source);
  const i64 base = ep_choice(c, source, tokens.begin);
  const int* rows = state.rows(source);
  const int* places = c.handle + c.handle_layout.places + base;
  struct Placed {
    int row, place;
  };
  if (role.thread() == 0) {
    ep_wait_in_cta(&state.done(source), ep_pieces(c.shape, tokens).count(), &shared.failed);
    shared.num_staged = 0;
  }
  role.sync();
  ep_load_ahead(
      role.thread(), role.num_threads(), tokens.size() * c.shape.topk,
      [&](int i) {
        return Placed{rows[i], places[i]};
      },
      [&](int i, Placed choice) {
        if (choice.row == kEpNotHere) return;
        state.staged_rows()[choice.place] = choice.row;
        state.staged_tokens()[choice.place] = c.by.topk.of(i);
        atomicAdd(&shared.num_staged, 1);
      });
  role.sync();
  const int count = ep_look(shared.num_staged), blocks = ceil_div(c.shape.hidden, kQuantizeBlock);
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < count; i += 32) {
    const i64 row = state.staged_rows()[i];
    if (row >= p.capacity) continue;
    const float* scales = state.stage(turn, state.staged_tokens()[i]);
#pragma unroll 4
    for (int b = role.warp(); b < blocks; b += role.num_warps) p.row_scales[row + b * p.row_scale_stride] = scales[b];
  }
  role.sync();
  if (role.thread() == 0) {
    ptx::fence_acq_rel_cta();
    *static_cast<volatile int*>(&shared.written) = turn + 1;
  }
}

// This CTA's tokens of all sources, its own first: the others' are on their way meanwhile. All warps take pieces; those
// that have sent write the scales of each source besides, where they are staged.
template <bool kCounted>
__device__ __forceinline__ void ep_receive_tokens(const EpDispatchParams& p, const EpOperation& op,
                                                  const EpRouteState& state, EpShared& shared, const EpRole& sender) {
  const EpShape& shape = p.c.shape;
  const bool staged = kCounted && shape.staged && p.format == kEpE4m3,
             has_sent = int(threadIdx.x) < sender.num_threads();
  int source = p.c.rank, turn = 0, begin = 0;
  EpPieces pieces = ep_pieces(shape, state.range(source));
#pragma unroll 1
  for (;;) {
    const int taken = ep_take(&shared.next);
#pragma unroll 1
    while (turn < shape.num_ranks && taken - begin >= pieces.count()) {
      const bool is_last = turn == shape.num_ranks - 1;  // when nobody has anything else to do
      if (staged && (has_sent || is_last))
        ep_write_staged_scales(p,
                               EpRole{is_last ? kEpAllWarps : kEpSenders, 0, is_last ? kEpDispatchWarps : kEpSendWarps},
                               state, shared, source, turn);
      begin += pieces.count();
      source = source == 0 ? shape.num_ranks - 1 : source - 1;  // in the order in which they send
      ++turn;
      pieces = ep_pieces(shape, state.range(source));
    }
    if (turn == shape.num_ranks) return;
    if (ep_look(shared.failed) != 0) continue;  // whoever meets others must still do so
    // The stage is that of the source before the last one.
    if (staged && turn >= 2 && threadIdx.x % 32 == 0) ep_wait_in_cta(&shared.written, turn - 1, &shared.failed);
    __syncwarp();
    if (!ep_receive_piece<kCounted>(p, op, state, pieces, source, turn, taken - begin)) shared.failed = 1;
    if (!staged) continue;
    __syncwarp();
    ptx::fence_acq_rel_cta();
    if (threadIdx.x % 32 == 0) atomicAdd(&state.done(source), 1);
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
    for (int i = threadIdx.x; i < c.shape.num_ranks * p.smem.seen_words; i += 32 * kEpDispatchWarps) {
      state.seen(0)[i] = 0;
      if (c.shape.staged && i < c.shape.num_ranks) state.done(i) = 0;
    }
  } else {
    ep_clear_counts(state);
  }
  __syncthreads();
  ptx::grid_wait_dependencies();
  if (!p.route && !ep_fits_handle(c, kEpPhaseTokens)) return;
  const EpOperation send(c, kEpDispatchSend), recv(c, kEpDispatchRecv);
  const bool only_sends = kCounted && int(blockIdx.x) >= ep_num_receivers(c.shape), receives = c.recv && !only_sends;
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
    const bool sends = c.send && p.copy && (only_sends || ep_all_send(p));
    const bool may_send = (sends || routes) && ep_may_send(send, sender, &shared.failed);
    if (routes) ptx::named_barrier_arrive(kEpMaySend, 32 * kEpDispatchWarps);
    if (sends && may_send) ep_send_tokens<kCounted>(p, send, sender, only_sends);
    if (receives) known = ep_await_routing(shared);
    // Not before: a release waits for what has been sent, and all would wait for this warp.
    if (threadIdx.x < 32 && !only_sends) ep_give_late_credits(recv, c.layout.dispatch_credit);
    if (kCounted && known) keep(first_half, first_half);
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
  if (known && p.copy) ep_receive_tokens<kCounted>(p, recv, state, shared, first_half);
  __syncthreads();
  ptx::grid_launch_dependents();  // not before: ranks may share a GPU, and what waits for a peer must not be in its way
  if (ep_look(shared.failed) != 0) return;
  if (c.send) ep_finish_send(send);
  if (receives) ep_finish_recv(recv, c.layout.dispatch_credit);
}

}  // namespace phalanx
