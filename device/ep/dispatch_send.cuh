// The sending half of dispatch, and how both halves move a token; dispatch.cuh says who does what.
#pragma once
#include "device/ep/route_state.cuh"
#include "device/ptx/memory.cuh"
#include "device/quantize/encode.cuh"

namespace phalanx {

// --- a token on its way: read once, kEpDispatchPieces a lane at a time, and written to every target ------------------

// Places of a token: lane l has one of its own if bit l of `lanes` is set.
struct EpTargets {
  u32 lanes;
  u8* data;
  float* scales;  // of the first block
  i64 scale_stride;
};

// The slots at rank `r`, one a lane; below 0 none.
template <bool kCounted>
__device__ __forceinline__ EpTargets ep_slots(const EpOperation& op, i64 token, int r) {
  const int lane = threadIdx.x % 32;
  const bool is_first = __ffs(__match_any_sync(0xffffffffu, r)) - 1 == lane;  // of those with the same rank
  EpTargets to{__ballot_sync(0xffffffffu, is_first && r >= 0), nullptr, nullptr, 1};
  if (r < 0) return to;
  to.data = ep_dispatch_slot<kCounted>(op, r, op.c.rank, token);
  to.scales = ep_token_scales<kCounted>(op, r, op.c.rank, token);
  return to;
}

// The rows of a token's choices, one a lane.
__device__ __forceinline__ EpTargets ep_rows(const EpDispatchParams& p, int row) {
  const bool has_room = row >= 0 && row < p.capacity;
  EpTargets to{__ballot_sync(0xffffffffu, has_room), nullptr, nullptr, p.row_scale_stride};
  if (!has_room) return to;
  to.data = static_cast<u8*>(p.rows) + row * p.row_stride * (p.format == kEpE4m3 ? 1 : 2);
  to.scales = p.row_scales + row;
  return to;
}

// 16 bytes of a token; where they tell by themselves that they have come, they go to rows as they go to slots.
template <bool kCounted>
__device__ __forceinline__ void ep_put_16(u8* to, const EpVector& v) {
  if constexpr (kCounted)
    *reinterpret_cast<EpVector*>(to) = v;
  else
    ep_put_into_slot(to, v);
}

// The scales of up to 32 blocks, one a lane.
template <bool kCounted>
__device__ __forceinline__ void ep_put_scales(const EpTargets& to, int block, bool inside, float scale) {
#pragma unroll 1
  for (u32 left = to.lanes; left != 0;) {
    float* scales = reinterpret_cast<float*>(__shfl_sync(0xffffffffu, reinterpret_cast<u64>(to.scales), ep_pop(left)));
    if (!inside) continue;
    if constexpr (kCounted)
      scales[block * to.scale_stride] = scale;
    else
      ptx::store_relaxed_sys(ep_word_of(scales + block * to.scale_stride), ep_something(__float_as_uint(scale)));
  }
}

// kCount pieces a lane, the first one at byte `at`, those behind `end` left out.
template <bool kCounted, int kCount>
__device__ __forceinline__ void ep_put(const EpTargets& to, const EpVector (&pieces)[kCount], i64 at, i64 end) {
#pragma unroll 1
  for (u32 left = to.lanes; left != 0;) {
    u8* target = reinterpret_cast<u8*>(__shfl_sync(0xffffffffu, reinterpret_cast<u64>(to.data), ep_pop(left))) + at;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (at + i * kEpPitch < end) ep_put_16<kCounted>(target + i * kEpPitch, pieces[i]);
  }
}

// Where a row's columns come from: memory of this rank.
struct EpRow {
  const u8* data;
  const float* scales;  // null: none
  i64 scale_stride;

  // False if it did not come.
  template <int kCount>
  __device__ __forceinline__ bool load(EpVector (&pieces)[kCount], i64 at, i64 end, float& scale, int block,
                                       bool has_scale) const {
    if (has_scale) scale = scales[block * scale_stride];
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (at + i * kEpPitch < end) pieces[i] = ep_load(data + at + i * kEpPitch);
    return true;
  }
};

// Or a slot that tells by itself that it has come, and is empty afterwards.
struct EpAwaitedRow {
  const EpCommon& c;
  int source;
  u64 expected;
  u8* data;
  float* scales;

  template <int kCount>
  __device__ __forceinline__ bool load(EpVector (&pieces)[kCount], i64 at, i64 end, float& scale, int block,
                                       bool has_scale) const {
    const auto look = [&] {
      const u32 bits = has_scale ? ptx::load_relaxed_sys(ep_word_of(scales + block)) : 0;
      bool is_here = bits != kEpNothing;
      scale = __uint_as_float(bits);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (at + i * kEpPitch >= end) continue;
        pieces[i] = ep_look_at_slot(data + at + i * kEpPitch);
        is_here = is_here && ep_is_here(pieces[i]);
      }
      return is_here;
    };
    if (!ep_look_until(c, kEpPhaseTokens, source, expected, look)) return false;
    if (has_scale) *ep_word_of(scales + block) = kEpNothing;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (at + i * kEpPitch < end) ep_empty_slot(data + at + i * kEpPitch);
    return true;
  }
};

// Columns of a row as they are, with scales if there are any.
template <bool kCounted, class Row>
__device__ __noinline__ bool ep_copy(const Row from, EpRange cols, int size, const EpTargets to) {
  constexpr int kPieces = kEpDispatchPieces<kCounted>, kBlocks = kPieces * kEpPitch / kQuantizeBlock;
  static_assert(kBlocks <= 32);  // so that the scales of a round are one a lane
  const int lane = threadIdx.x % 32;
  const i64 end = i64(cols.end) * size;
#pragma unroll 1
  for (i64 first = i64(cols.begin) * size; first < end; first += kPieces * kEpPitch) {
    const i64 at = first + lane * 16;
    const int block = int(first / kQuantizeBlock) + lane;
    const bool has_scale = from.scales && lane < kBlocks && block * kQuantizeBlock < cols.end;
    float scale = 0;
    EpVector pieces[kPieces];
    if (!from.load(pieces, at, end, scale, block, has_scale)) return false;
    ep_put<kCounted>(to, pieces, at, end);
    if (from.scales) ep_put_scales<kCounted>(to, block, has_scale, scale);
  }
  return true;
}

// Columns of a BF16 row as E4M3.
template <bool kCounted>
__device__ __noinline__ void ep_copy_quantized(const u8* from, EpRange cols, bool pow2, const EpTargets to) {
  using Columns = Piece<FloatType::bf16, 16>;    // they become one of ours
  constexpr int kPieces = kCounted ? 2 : 1;      // there is a kernel to quantise many tokens before
  constexpr int kBlocks = 32 / Columns::kLanes;  // of a warp's piece
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
    ep_put<kCounted>(to, pieces, col, cols.end);
    const int block = first / kQuantizeBlock + lane;
    ep_put_scales<kCounted>(to, block, lane < kPieces * kBlocks && block * kQuantizeBlock < cols.end, scale);
  }
}

// Bytes of an element of x.
__device__ __forceinline__ int ep_x_size(const EpDispatchParams& p) { return p.x_format == kEpE4m3 ? 1 : 2; }
__device__ __forceinline__ bool ep_quantizes(const EpDispatchParams& p) { return p.x_format != p.format; }

// Columns of a token of this rank, in the format that is sent; with many tokens without the scales that it has.
template <bool kCounted>
__device__ __forceinline__ void ep_move_own(const EpDispatchParams& p, i64 token, EpRange cols, const EpTargets& to) {
  const int size = ep_x_size(p);
  const u8* data = static_cast<const u8*>(p.x) + token * p.x_stride * size;
  if (ep_quantizes(p))
    ep_copy_quantized<kCounted>(data, cols, p.pow2_scales, to);
  else
    ep_copy<kCounted>(
        EpRow{data, !kCounted && size == 1 ? p.x_scales + token * p.x_scale_stride_row : nullptr, p.x_scale_stride_col},
        cols, size, to);
}

// --- sending --------------------------------------------------------------------------------------------------------

// So few CTAs that only send have so much to send that their next tokens should be in L2 already; more of them have the
// link to wait for, and would be in each other's way.
constexpr int kEpFewSenders = 8;

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

// A token of this rank, of elements of so many bytes, into the L2. By so many threads.
__device__ __forceinline__ void ep_prefetch_token(const EpDispatchParams& p, int token, i64 size, int thread,
                                                  int num_threads) {
#pragma unroll 1
  for (int at = thread * 128; at < p.c.shape.hidden * size; at += num_threads * 128)
    ptx::prefetch_l2(static_cast<const u8*>(p.x) + token * p.x_stride * size + at);
}

// The pieces first, first + step, ... to the peer `only`, or below 0 to all, if they have an expert of their token.
// Pieces are those of all tokens, of each receiving CTA's in turn, so that none has to wait for long. By a warp.
template <bool kCounted>
__device__ __forceinline__ void ep_send_pieces(const EpDispatchParams& p, const EpOperation& op, int first, int step,
                                               int only, EpFlags& flags) {
  const EpCommon& c = p.c;
  const EpShape& shape = c.shape;
  const int lane = threadIdx.x % 32, receivers = ep_num_receivers(shape);
  const int tokens_per_cta = c.by.receivers.up(c.num_tokens), count = (receivers * tokens_per_cta) << shape.log2_parts;
  const auto token_of = [&](int i) {  // may be behind the last
    const int number = i >> shape.log2_parts;
    const int of_cta = c.by.receivers.of(number);
    return (number - of_cta * receivers) * tokens_per_cta + of_cta;
  };
  const auto rank_of = [&](int i) {  // of this lane's choice, if the piece goes there
    const int token = token_of(i);
    if (i >= count || lane >= shape.topk || token >= c.num_tokens) return -1;
    const int r = ep_rank_of(c.first_expert, shape.num_ranks, ep_expert_of(p, ep_load_choice(p, token, lane)));
    return (kCounted && r == c.rank) || (only >= 0 && r != only) ? -1 : r;
  };
  int next = rank_of(first);
#pragma unroll 1
  for (int i = first; i < count; i += step) {
    const int r = next, token = token_of(i), part = i & ((1 << shape.log2_parts) - 1);
    const EpTargets to = ep_slots<kCounted>(op, token, r);
    next = rank_of(i + step);
    if (to.lanes == 0) continue;
    if constexpr (kCounted) {
      const bool is_full = flags.count >= kEpPiecesPerFlag || flags.count + __popc(to.lanes) > 32;
      if (is_full || shape.log2_parts != 0) flags.raise(ep_flag(op.epoch, p.sent, 1));
      flags.add(to.lanes, ep_piece_flag(op, r < 0 ? c.rank : r, c.rank, token, part));
      const int ahead = token_of(i + step);
      if (shape.num_senders <= kEpFewSenders && ahead < c.num_tokens)
        ep_prefetch_token(p, ahead, ep_x_size(p), lane, 32);
    }
    ep_move_own<kCounted>(p, token, ep_cols(shape, part), to);
  }
}

// Whether the first warps of CTAs that receive send tokens, too. Quantising takes as many as there are.
__device__ __forceinline__ bool ep_all_send(const EpDispatchParams& p) {
  return p.c.shape.num_senders == 0 || ep_quantizes(p);
}

// By all warps that send.
template <bool kCounted>
__device__ __forceinline__ void ep_send_tokens(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                               bool only_sends) {
  const EpShape& shape = p.c.shape;
  const int receivers = ep_num_receivers(shape), senders = shape.num_senders * kEpDispatchWarps;
  const int first = role.warp() + (only_sends ? (int(blockIdx.x) - receivers) * kEpDispatchWarps
                                              : senders + int(blockIdx.x) * kEpSendWarps);
  const int step = senders + (ep_all_send(p) ? receivers * kEpSendWarps : 0);
  // Not where tokens are few or their pieces little; and a token is quantised once, not once for each peer.
  const bool in_turns = kCounted && shape.log2_parts == 0 && !ep_quantizes(p);
  EpFlags flags;
#pragma unroll 1
  for (int turn = 1; turn < (in_turns ? shape.num_ranks : 2); ++turn) {
    const int next = p.c.rank + turn, to = next < shape.num_ranks ? next : next - shape.num_ranks;
    ep_send_pieces<kCounted>(p, op, first, step, in_turns ? to : -1, flags);
    if constexpr (kCounted) flags.raise(ep_flag(op.epoch, p.sent, 1));
  }
}

// Many tokens: scales that x has do not go with tokens.
__device__ __forceinline__ bool ep_has_scales(const EpDispatchParams& p) { return p.copy && p.x_format == kEpE4m3; }

// Those of this CTA's tokens, to all ranks, this one too. As x has those of a block side by side, they are turned
// around. By a role.
__device__ __forceinline__ void ep_send_scales(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                               float* turned) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32, num_ranks = c.shape.num_ranks, all_blocks = ep_num_blocks(c.shape.hidden);
  const EpRange tokens = ep_tokens_of_cta(c.num_tokens, blockIdx.x, c.by.receivers);
#pragma unroll 1
  for (int first = tokens.begin; first < tokens.end; first += kEpTurnedTokens)
#pragma unroll 1
    for (int block = 0; block < all_blocks; block += kEpTurnedBlocks) {
      const int count = min_of(kEpTurnedTokens, tokens.end - first),
                blocks = min_of(kEpTurnedBlocks, all_blocks - block);
      const i64 at = min_of(first + lane, tokens.end - 1) * p.x_scale_stride_row + block * p.x_scale_stride_col;
      ep_load_ahead<8>(
          role.warp(), role.num_warps, blocks, [&](int b) { return p.x_scales[at + b * p.x_scale_stride_col]; },
          [&](int b, float scale) { turned[lane * kEpTurnedPitch + b] = scale; });
      role.sync();
#pragma unroll 1
      for (int t = role.warp(); t < count; t += role.num_warps)
        if (lane < ceil_div(blocks, 4)) {
          const EpVector v = *reinterpret_cast<const EpVector*>(turned + t * kEpTurnedPitch + lane * 4);
#pragma unroll 1
          for (int r = 0; r < num_ranks; ++r)
            *reinterpret_cast<EpVector*>(ep_token_scales<true>(op, r, c.rank, first + t) + block + lane * 4) = v;
        }
      role.sync();
    }
  if (const int r = role.thread(); r < num_ranks)
    ptx::store_release_sys(op.word(r, c.layout.scale_flags, c.rank * c.shape.num_ctas + int(blockIdx.x)),
                           ep_flag(op.epoch, p.sent, 1));
}

// This CTA's tokens into the L2, while credits are waited for. By a role.
__device__ __forceinline__ void ep_prefetch_tokens(const EpDispatchParams& p, const EpRole& role) {
  const EpRange tokens = ep_tokens_of_cta(p.c.num_tokens, blockIdx.x, p.c.by.receivers);
  const i64 size = ep_x_size(p);
#pragma unroll 1
  for (int t = tokens.begin; t < tokens.end; ++t) ep_prefetch_token(p, t, size, role.thread(), role.num_threads());
}

}  // namespace phalanx
