// Dispatch: every token crosses to a rank once and becomes as many rows there as it has experts.
//
//   rows[row(s, t, k)] = x_s[t], for every source s, token t and choice k of an expert of this rank
//
//   sending warps   x[t], quantised if wanted ----------------> peers' token slots;        token flags, one a piece
//                   rows, weights ----------------------------> the handle, row_weights
//   receiving warps topk_idx ---------------------------------> peers' choices, weights;   route flags
//                   choices --> rows of all tokens (route.cuh)
//   all warps       x[t] of this rank, then slots behind their flags --> rows; those that have sent: scales, MN-major
//                   all read --> credits, behind which peers may send again into the same buffer
//
// With many tokens, x[t] is sent by CTAs that do nothing else, to one peer after the other: rank r to r + 1, r + 2, ...,
// and receives from r - 1, r - 2, ... So each link has one sender at a time, and a source's scales are written while
// the next one's tokens come.
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

// The slots at rank `r`, one a lane; where it is this rank, none.
__device__ __forceinline__ EpTargets ep_slots(const EpOperation& op, i64 token, int r) {
  const EpCommon& c = op.c;
  const int lane = threadIdx.x % 32;
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

// Flags that a warp will raise together, one a lane.
struct EpFlags {
  u64* mine = nullptr;
  int count = 0;

  // Those in `lanes`, which must fit.
  __device__ __forceinline__ void add(u32 lanes, u64* flag) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    while (lanes != 0) {
      const u64 added = __shfl_sync(0xffffffffu, reinterpret_cast<u64>(flag), ep_pop(lanes));
      if (lane == count) mine = reinterpret_cast<u64*>(added);
      ++count;
    }
  }
  __device__ __forceinline__ void raise(u64 value) {
    __syncwarp();
    if (int(threadIdx.x) % 32 < count) ptx::store_release_sys(mine, value);
    count = 0;
  }
};

// The pieces first, first + step, ... to the peer `only`, or below 0 to all, if they have an expert of their token. Pieces
// are those of all tokens, of each receiving CTA's in turn, so that none has to wait for long. By a warp.
__device__ __forceinline__ void ep_send_pieces(const EpDispatchParams& p, const EpOperation& op, int first, int step,
                                               int only) {
  const EpCommon& c = p.c;
  const EpShape& shape = c.shape;
  const int lane = threadIdx.x % 32, receivers = ep_num_receivers(shape);
  const int tokens_per_cta = ceil_div(c.num_tokens, receivers), count = (receivers * tokens_per_cta)
                                                                        << shape.log2_parts;
  const auto token_of = [&](int i) {  // may be behind the last
    const int number = i >> shape.log2_parts;
    return number % receivers * tokens_per_cta + number / receivers;
  };
  const auto rank_of = [&](int i) {  // of this lane's choice, if the piece goes there
    const int token = token_of(i);
    if (i >= count || lane >= shape.topk || token >= c.num_tokens) return c.rank;
    const int expert = ep_own_expert(p, token, lane);
    const int r = expert < 0 ? c.rank : ep_rank_of(c.first_expert, shape.num_ranks, expert);
    return only < 0 || r == only ? r : c.rank;
  };
  int next = rank_of(first);
  EpFlags flags;
#pragma unroll 1
  for (int i = first; i < count; i += step) {
    const int r = next, token = token_of(i), part = i & ((1 << shape.log2_parts) - 1);
    const EpTargets to = ep_slots(op, token, r);
    next = rank_of(i + step);
    if (to.lanes == 0) continue;
    flags.add(to.lanes, ep_piece_flag(op, r, c.rank, token, part));
    ep_move_own(p, token, ep_cols(shape, part), to);
    if (shape.log2_parts != 0 || flags.count >= kEpPiecesPerFlag) flags.raise(ep_flag(op.epoch, p.format, 1));
  }
  flags.raise(ep_flag(op.epoch, p.format, 1));
}

// Tokens are quantised once, not once for each peer, and by as many as there are.
__device__ __forceinline__ bool ep_quantizes(const EpDispatchParams& p) { return p.x_format != p.format; }

// Whether the first warps of CTAs that receive send tokens, too.
__device__ __forceinline__ bool ep_all_send(const EpDispatchParams& p) {
  return p.c.shape.num_senders == 0 || ep_quantizes(p);
}

// By all warps that send.
__device__ __forceinline__ void ep_send_tokens(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                               bool only_sends) {
  const EpShape& shape = p.c.shape;
  const int receivers = ep_num_receivers(shape), senders = shape.num_senders * kEpDispatchWarps;
  const int first = role.warp() + (only_sends ? (int(blockIdx.x) - receivers) * kEpDispatchWarps
                                              : senders + int(blockIdx.x) * kEpSendWarps);
  const int step = senders + (ep_all_send(p) ? receivers * kEpSendWarps : 0);
  const bool in_turns = shape.log2_parts == 0 && !ep_quantizes(p);  // pieces of a token are little
#pragma unroll 1
  for (int turn = 1; turn < (in_turns ? shape.num_ranks : 2); ++turn)
    ep_send_pieces(p, op, first, step, in_turns ? (p.c.rank + turn) % shape.num_ranks : -1);
}

// This CTA's tokens into the L2, while credits are waited for. By a role.
__device__ __forceinline__ void ep_prefetch_tokens(const EpDispatchParams& p, const EpRole& role) {
  const EpShape& shape = p.c.shape;
  const EpRange tokens = ep_tokens_of_cta(p.c.num_tokens, blockIdx.x, ep_num_receivers(shape));
  const i64 size = p.x_format == kEpE4m3 ? 1 : 2;
#pragma unroll 1
  for (int t = tokens.begin; t < tokens.end; ++t)
#pragma unroll 1
    for (int at = role.thread() * 128; at < shape.hidden * size; at += role.num_threads() * 128)
      ptx::prefetch_l2(static_cast<const u8*>(p.x) + t * p.x_stride * size + at);
}

// By the whole role: until all peers have read what was sent before.
__device__ __forceinline__ bool ep_may_send(const EpOperation& op, const EpRole& role, int* failed) {
  const bool fine = ep_wait_for_credits(op, kEpPhaseDispatchCredit, op.c.layout.dispatch_credit,
                                        {0, ep_num_receivers(op.c.shape)}, role.thread(), role.num_threads());
  return role.all(fine, failed);
}

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

// Piece i of a source's tokens of this CTA, to its rows. By a warp.
__device__ __forceinline__ bool ep_receive_piece(const EpDispatchParams& p, const EpOperation& op,
                                                 const EpRouteState& state, const EpPieces& pieces, int source,
                                                 int turn, int i) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32, size = p.format == kEpE4m3 ? 1 : 2;
  const int token = pieces.token(i), number = token - pieces.tokens.begin;
  const EpRange cols = ep_cols(c.shape, pieces.part(i));
  const int row = lane < c.shape.topk ? state.rows(source)[number * c.shape.topk + lane] : kEpNotHere;
  const EpTargets to = ep_rows(p, row, c.shape.staged ? state.stage(turn, number) : nullptr);
  if (to.lanes == 0) return true;
  if (source == c.rank) {
    ep_move_own(p, token, cols, to);
    return true;
  }
  int fine = 1;
  if (lane == 0) fine = ep_wait_for_piece(op, source, p.format, token, pieces.part(i));
  __syncwarp();
  if (!__shfl_sync(0xffffffffu, fine, 0)) return false;
  const i64 at = i64(ep_peer_idx(c.rank, source)) * c.shape.max_tokens + token;
  const u8* slot = op.buffer(c.rank, c.layout.tokens) + at * c.layout.token_slot;
  const float* scales = size == 1 ? reinterpret_cast<const float*>(slot + ep_scales_offset(c.shape.hidden)) : nullptr;
  ep_copy(slot, scales, 1, cols, size, to);
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
      source = source == 0 ? shape.num_ranks - 1 : source - 1;  // in the order in which they send
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
  const EpOperation send(c, kEpDispatchSend), recv(c, kEpDispatchRecv);
  const bool only_sends = int(blockIdx.x) >= ep_num_receivers(c.shape), receives = c.recv && !only_sends;
  const EpRole sender{1, 0, only_sends ? kEpDispatchWarps : kEpSendWarps};
  const EpRole receiver{2, kEpSendWarps, kEpDispatchWarps - kEpSendWarps}, first_half{1, 0, kEpSendWarps};
  bool known = false;  // the same in all threads
  if (int(threadIdx.x) < sender.num_threads()) {
    if (!only_sends && sender.warp() == 0) ep_give_late_credits(recv, c.layout.dispatch_credit);
    if (!kCounted && c.send && p.copy) ep_prefetch_tokens(p, sender);
    if (c.send && p.copy && (only_sends || ep_all_send(p)) && ep_may_send(send, sender, &shared.failed))
      ep_send_tokens(p, send, sender, only_sends);
    if (receives) {
      ptx::named_barrier_sync(kRowsKnown, kThreads);
      known = ep_look(shared.known) != 0;
      if (known && !ep_keep_rows<kCounted>(p, recv, first_half, state)) shared.failed = 1;
      if (known && blockIdx.x == 0) ep_publish_routing(p, first_half, state);
    }
  } else {
    if (c.send && p.route && ep_may_send(send, receiver, &shared.failed))
      ep_send_routing<kCounted>(p, send, receiver, state);
    if (receives) {
      known = ep_receive_routing<kCounted>(p, recv, receiver, state, &shared.failed);
      if (known) shared.known = 1;
      ptx::named_barrier_arrive(kRowsKnown, kThreads);
      if (known && p.copy) ep_write_padding(p, receiver, state);
    }
  }
  if (known && p.copy) ep_receive_tokens(p, recv, state, shared, first_half);
  __syncthreads();
  if (ep_look(shared.failed) != 0) return;
  if (c.send) ep_finish_send(send);
  if (receives) ep_finish_recv(recv, c.layout.dispatch_credit);
}

}  // namespace phalanx
