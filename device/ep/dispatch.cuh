// Dispatch: every token crosses to a rank once and becomes as many rows there as it has experts.
//
//   rows[row(s, t, k)] = x_s[t], for every source s, token t and choice k of an expert of this rank
//
//   sending warps   topk_idx ---------------------------------> peers' choices, weights;   route flags
//                   x[t], quantised if wanted ----------------> peers' token slots;        token flags, one a warp
//                   rows, weights ----------------------------> the handle, row_weights
//   receiving warps choices --> rows of all tokens (route.cuh)
//   all warps       x[t] of this rank, then slots behind their flags --> rows; those that have sent: scales, MN-major
//                   all read --> credits, behind which peers may send again into the same buffer
//
// A CTA handles the same tokens on both sides, so that it waits for one CTA a peer only, but for the routing.
#pragma once
#include "device/ep/route.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/memory.cuh"
#include "device/quantize/encode.cuh"

namespace phalanx {

// --- a token on its way: read once, kEpDispatchPieces pieces a lane, and written to every target ---------------------

// Places of a token: lane l has one of its own if bit l of `lanes` is set. Scales go to the targets, or where they are
// staged to shared memory once.
struct EpTargets {
  u32 lanes;
  u8* data;
  float* scales;  // of the first block
  i64 scale_stride;
  float* stage;
};

// The slots of the peers that have an expert of the token, whose choices are one a lane (below 0: none).
__device__ __forceinline__ EpTargets ep_slots(const EpOperation& op, i64 token, int expert) {
  const EpCommon& c = op.c;
  const int lane = threadIdx.x % 32, r = expert < 0 ? c.rank : ep_rank_of(c.first_expert, c.shape.num_ranks, expert);
  const bool is_first = __ffs(__match_any_sync(0xffffffffu, r)) - 1 == lane;  // of those with the same rank
  EpTargets to{__ballot_sync(0xffffffffu, is_first && r != c.rank), nullptr, nullptr, 1, nullptr};
  if (r == c.rank) return to;
  to.data =
      op.buffer(r, c.layout.tokens) + (i64(ep_peer_idx(r, c.rank)) * c.shape.max_tokens + token) * c.layout.token_slot;
  to.scales = reinterpret_cast<float*>(to.data + ep_scales_offset(c.shape.hidden));
  return to;
}

// The rows of a token's choices, one a lane.
__device__ __forceinline__ EpTargets ep_rows(const EpDispatchParams& p, int row, float* stage) {
  const bool has_room = row >= 0 && row < p.capacity;
  EpTargets to{__ballot_sync(0xffffffffu, has_room), nullptr, nullptr, p.row_scale_stride, stage};
  if (!has_room) return to;
  to.data = static_cast<u8*>(p.rows) + row * p.row_stride * (p.format == kEpE4m3 ? 1 : 2);
  to.scales = p.row_scales + row;
  return to;
}

// The scales of up to 32 blocks, one a lane.
__device__ __forceinline__ void ep_put_scales(const EpTargets& to, int block, bool inside, float scale) {
  if (to.stage) {
    if (inside) to.stage[block] = scale;
    return;
  }
#pragma unroll 1
  for (u32 left = to.lanes; left != 0;) {
    const u64 scales = __shfl_sync(0xffffffffu, reinterpret_cast<u64>(to.scales), ep_pop(left));
    if (inside) reinterpret_cast<float*>(scales)[block * to.scale_stride] = scale;
  }
}

// kCount pieces a lane, the first one at byte `at`, those behind `end` left out.
template <int kCount>
__device__ __forceinline__ void ep_put(const EpTargets& to, const EpVector (&pieces)[kCount], i64 at, i64 end) {
#pragma unroll 1
  for (u32 left = to.lanes; left != 0;) {
    u8* target = reinterpret_cast<u8*>(__shfl_sync(0xffffffffu, reinterpret_cast<u64>(to.data), ep_pop(left))) + at;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (at + i * kEpPitch < end) *reinterpret_cast<EpVector*>(target + i * kEpPitch) = pieces[i];
  }
}

// Columns of a row as they are, with scales if there are any.
__device__ __noinline__ void ep_copy(const u8* from, const float* scales, i64 scale_stride, EpRange cols, int size,
                                     const EpTargets to) {
  constexpr int kPieces = kEpDispatchPieces;
  const int lane = threadIdx.x % 32;
  const i64 end = i64(cols.end) * size;
#pragma unroll 1
  for (i64 first = i64(cols.begin) * size; first < end; first += kPieces * kEpPitch) {
    static_assert(kPieces * kEpPitch == 32 * kQuantizeBlock);  // so that the scales of a round are one a lane
    const i64 at = first + lane * 16;
    const int block = int(first / kQuantizeBlock) + lane;
    const bool has_scale = scales && block * kQuantizeBlock < cols.end;
    const float scale = has_scale ? scales[block * scale_stride] : 0.0f;
    EpVector pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (at + i * kEpPitch < end) pieces[i] = ep_load(from + at + i * kEpPitch);
    ep_put(to, pieces, at, end);
    if (scales) ep_put_scales(to, block, has_scale, scale);
  }
}

// Columns of a BF16 row as E4M3.
__device__ __noinline__ void ep_copy_quantized(const u8* from, EpRange cols, bool pow2, const EpTargets to) {
  using Columns = Piece<FloatType::bf16, 16>;                                     // they become one of ours
  constexpr int kPieces = kEpDispatchPieces / 2, kBlocks = 32 / Columns::kLanes;  // of a warp's piece
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = cols.begin; first < cols.end; first += kPieces * kEpPitch) {
    const int col = first + lane * 16;
    Columns x[kPieces] = {};
    EpVector pieces[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (col + i * kEpPitch >= cols.end) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const EpVector v = ep_load(from + 2 * (col + i * kEpPitch) + half * 16);
#pragma unroll
        for (int n = 0; n < 4; ++n) x[i].word[half * 4 + n] = v.word[n];
      }
    }
    float scale = 0;  // of block `lane` of this round
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      u32 magnitude[1] = {finite_maximum(x[i])};
      const u32 maximum = max_over_lanes<Columns::kLanes>(magnitude);
      const float of_piece = scale_of(Magnitudes<FloatType::bf16>::value(maximum), pow2);
      encode(pieces[i].word, x[i], __frcp_rn(of_piece));
      const float mine = __shfl_sync(0xffffffffu, of_piece, lane % kBlocks * Columns::kLanes);
      if (lane / kBlocks == i) scale = mine;
    }
    ep_put(to, pieces, col, cols.end);
    const int block = first / kQuantizeBlock + lane;
    ep_put_scales(to, block, lane < kPieces * kBlocks && block * kQuantizeBlock < cols.end, scale);
  }
}

// Columns of a token of this rank, in the format that is sent.
__device__ __forceinline__ void ep_move_own(const EpDispatchParams& p, i64 token, EpRange cols, const EpTargets& to) {
  const int size = p.x_format == kEpE4m3 ? 1 : 2;
  const u8* data = static_cast<const u8*>(p.x) + token * p.x_stride * size;
  if (p.x_format != p.format)
    ep_copy_quantized(data, cols, p.pow2_scales, to);
  else
    ep_copy(data, size == 1 ? p.x_scales + token * p.x_scale_stride_row : nullptr, p.x_scale_stride_col, cols, size,
            to);
}

// --- sending --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void ep_send_tokens(const EpDispatchParams& p, const EpOperation& op, const EpRole& role) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  const EpPieces pieces = ep_pieces(c.shape, ep_tokens_of_cta(c.num_tokens, blockIdx.x, c.shape.num_ctas));
  const auto expert_of = [&](int i) {
    return i < pieces.count() && lane < c.shape.topk ? ep_own_expert(p, pieces.token(i), lane) : -1;
  };
  int next_expert = expert_of(role.warp());
#pragma unroll 1
  for (int i = role.warp(); i < pieces.count(); i += kEpSendWarps) {
    const EpTargets to = ep_slots(op, pieces.token(i), next_expert);
    next_expert = expert_of(i + kEpSendWarps);
    if (to.lanes != 0) ep_move_own(p, pieces.token(i), pieces.cols(i), to);
    ep_tell(op, {0, c.shape.num_ranks}, c.layout.token_flags, p.format, i, pieces.count());
  }
}

template <bool kCounted>
__device__ __forceinline__ void ep_dispatch_send(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                 const EpRouteState& state, int* failed) {
  const EpCommon& c = p.c;
  const EpRange tokens = ep_tokens_of_cta(c.num_tokens, blockIdx.x, c.shape.num_ctas);
  // What needs no credit is asked for before they are waited for.
  const EpOwnChoice first(p, tokens, kCounted ? tokens.size() * c.shape.topk : role.thread());
  if (!kCounted && p.copy) {
    const int size = p.x_format == kEpE4m3 ? 1 : 2;
#pragma unroll 1
    for (int t = tokens.begin; t < tokens.end; ++t)
#pragma unroll 1
      for (int at = role.thread() * 128; at < c.shape.hidden * size; at += role.num_threads() * 128)
        ptx::prefetch_l2(static_cast<const u8*>(p.x) + t * p.x_stride * size + at);
  }
  const bool fine = ep_wait_for_credits(op, kEpPhaseDispatchCredit, c.layout.dispatch_credit, {0, c.shape.num_ctas},
                                        role.thread(), role.num_threads());
  if (!role.all(fine, failed)) return;
  if (p.route) {
    ep_send_header(op, role);
    if constexpr (kCounted)
      ep_send_counted(p, op, role, state, tokens);
    else
      ep_send_choices(p, op, role, tokens, first);
  }
  if (p.copy) ep_send_tokens(p, op, role);
}

// --- receiving ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void ep_write_padding(const EpDispatchParams& p, const EpRole& role,
                                                 const EpRouteState& state) {
  const int lane = threadIdx.x % 32, hidden = p.c.shape.hidden, size = p.format == kEpE4m3 ? 1 : 2;
#pragma unroll 1
  for (int e = blockIdx.x; e < ep_num_local_experts(p.c); e += p.c.shape.num_ctas) {
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

// Piece i of a source's tokens of this CTA, to its rows. By a warp.
__device__ __forceinline__ bool ep_receive_piece(const EpDispatchParams& p, const EpOperation& op,
                                                 const EpRouteState& state, const EpPieces& pieces, int source,
                                                 int turn, int i) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32, size = p.format == kEpE4m3 ? 1 : 2;
  const int token = pieces.token(i), number = token - pieces.tokens.begin;
  const int row = lane < c.shape.topk ? state.rows(source)[number * c.shape.topk + lane] : kEpNotHere;
  const EpTargets to = ep_rows(p, row, c.shape.staged ? state.stage(turn, number) : nullptr);
  if (to.lanes == 0) return true;
  if (source == c.rank) {
    ep_move_own(p, token, pieces.cols(i), to);
    return true;
  }
  int fine = 1;
  if (lane == 0) fine = ep_wait_for_piece(op, kEpPhaseTokens, source, c.layout.token_flags, p.format, i);
  __syncwarp();
  if (!__shfl_sync(0xffffffffu, fine, 0)) return false;
  const i64 at = i64(ep_peer_idx(c.rank, source)) * c.shape.max_tokens + token;
  const u8* slot = op.buffer(c.rank, c.layout.tokens) + at * c.layout.token_slot;
  const float* scales = size == 1 ? reinterpret_cast<const float*>(slot + ep_scales_offset(c.shape.hidden)) : nullptr;
  ep_copy(slot, scales, 1, pieces.cols(i), size, to);
  return true;
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
  if (role.thread() == 0) {
    ep_wait_in_cta(&state.done(source), ep_pieces(c.shape, tokens).count(), &shared.failed);
    shared.num_staged = 0;
  }
  role.sync();
#pragma unroll 4
  for (int i = role.thread(); i < tokens.size() * c.shape.topk; i += role.num_threads()) {
    const int row = rows[i];
    if (row == kEpNotHere) continue;
    state.staged_rows()[places[i]] = row;
    state.staged_tokens()[places[i]] = i / c.shape.topk;
    atomicAdd(&shared.num_staged, 1);
  }
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
__device__ __forceinline__ void ep_receive_tokens(const EpDispatchParams& p, const EpOperation& op,
                                                  const EpRouteState& state, EpShared& shared, const EpRole& sender) {
  const EpShape& shape = p.c.shape;
  const bool staged = shape.staged && p.format == kEpE4m3, has_sent = int(threadIdx.x) < sender.num_threads();
  int source = p.c.rank, turn = 0, begin = 0;
  EpPieces pieces = ep_pieces(shape, state.range(source));
#pragma unroll 1
  for (;;) {
    const int taken = ep_take(&shared.next);
#pragma unroll 1
    while (turn < shape.num_ranks && taken - begin >= pieces.count()) {
      if (staged && has_sent) ep_write_staged_scales(p, sender, state, shared, source, turn);
      begin += pieces.count();
      source = source + 1 == shape.num_ranks ? 0 : source + 1;
      ++turn;
      pieces = ep_pieces(shape, state.range(source));
    }
    if (turn == shape.num_ranks) return;
    if (ep_look(shared.failed) != 0) continue;  // whoever meets others must still do so
    // The stage is that of the source before the last one.
    if (staged && turn >= 2 && threadIdx.x % 32 == 0) ep_wait_in_cta(&shared.written, turn - 1, &shared.failed);
    __syncwarp();
    if (!ep_receive_piece(p, op, state, pieces, source, turn, taken - begin)) shared.failed = 1;
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
#pragma unroll 1
  for (int r = threadIdx.x; c.shape.staged && r < c.shape.num_ranks; r += 32 * kEpDispatchWarps) state.done(r) = 0;
  __syncthreads();
  ptx::grid_wait_dependencies();
  constexpr int kRowsKnown = 3, kThreads = 32 * kEpDispatchWarps;
  const EpRole sender{1, 0, kEpSendWarps}, receiver{2, kEpSendWarps, kEpDispatchWarps - kEpSendWarps};
  const EpOperation send(c, kEpDispatchSend), recv(c, kEpDispatchRecv);
  const auto failed = [&] { return ep_look(shared.failed) != 0; };
  if (threadIdx.x < kEpSendWarps * 32) {
    if (c.send) ep_dispatch_send<kCounted>(p, send, sender, state, &shared.failed);
    if (c.recv) {
      ptx::named_barrier_sync(kRowsKnown, kThreads);
      if (!failed()) {
        if (!ep_keep_rows<kCounted>(p, recv, sender, state)) shared.failed = 1;
        if (blockIdx.x == 0) ep_publish_routing(p, sender, state);
      }
    }
  } else if (c.recv) {
    const bool known = ep_receive_routing<kCounted>(p, recv, receiver, state, &shared.failed);
    ptx::named_barrier_arrive(kRowsKnown, kThreads);
    if (known && p.copy) ep_write_padding(p, receiver, state);
  }
  if (c.recv && p.copy) ep_receive_tokens(p, recv, state, shared, sender);
  __syncthreads();
  if (failed()) return;
  if (c.send) ep_finish_send(send);
  if (c.recv) ep_finish_recv(recv, c.layout.dispatch_credit);
}

}  // namespace phalanx
