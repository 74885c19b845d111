// Dispatch: every token crosses to a rank once and becomes as many rows there as it has experts.
//
//   rows[row(s, t, k)] = x_s[t], for every source s, token t and choice k of an expert of this rank
//
//   sending warps   topk_idx ---------------------------------> peers' experts, weights;   route flags
//                   x[t], quantised if wanted ----------------> peers' token slots;        token flags, one a warp
//   receiving warps route flags --> rows of all tokens (route.cuh)
//                   x[t] of this rank, then slots behind their flags --> rows, scales MN-major, row_weights
//                   all read --> credits, behind which peers may send again into the same buffer
//
// A CTA handles the same tokens on both sides, so that it waits for one CTA a peer only, but for the routing.
#pragma once
#include "device/ep/route.cuh"
#include "device/ep/stream.cuh"
#include "device/ptx/convert.cuh"
#include "device/quantize/config.h"

namespace phalanx {

// --- a token on its way: read once, 16 bytes a lane, and written to every place in `to` -----------------------------

// Slots of the peers that have an expert of the token.
struct EpSlots {
  const EpOperation& op;
  i64 token;
  u64 ranks;

  template <class F>
  __device__ __forceinline__ void for_each_data(const F& f) const {
    const EpCommon& c = op.c;
    for (u64 left = ranks; left != 0;) {
      const int r = ep_pop(left);
      const i64 slot = i64(ep_peer_idx(r, c.rank)) * c.shape.max_tokens + token;
      f(op.buffer(r, c.layout.tokens) + slot * c.layout.token_slot);
    }
  }
  template <class F>
  __device__ __forceinline__ void for_each_scales(const F& f) const {
    for_each_data([&](u8* slot) { f(reinterpret_cast<float*>(slot + ep_scales_offset(op.c.shape.hidden)), i64(1)); });
  }
};

// Rows of the token's experts here: lane k has that of choice k.
struct EpRows {
  const EpDispatchParams& p;
  i64 row_bytes;
  int row;
  u32 choices;

  template <class F>
  __device__ __forceinline__ void for_each_data(const F& f) const {
    for (u32 left = choices; left != 0;)
      f(static_cast<u8*>(p.rows) + i64(__shfl_sync(0xffffffffu, row, ep_pop(left))) * row_bytes);
  }
  template <class F>
  __device__ __forceinline__ void for_each_scales(const F& f) const {
    for (u32 left = choices; left != 0;)
      f(p.row_scales + __shfl_sync(0xffffffffu, row, ep_pop(left)), p.row_scale_stride);
  }
};

template <class To>
__device__ __forceinline__ void ep_copy_bytes(const u8* from, i64 begin, i64 end, u8* ring, const To& to) {
  ep_stream<kEpDispatchDepth>(from, begin, end, ring, [&](i64 at, bool inside, const EpVector& piece) {
    to.for_each_data([&](u8* place) {
      if (inside) *reinterpret_cast<EpVector*>(place + at) = piece;
    });
  });
}

// The scales of a part's blocks, a block a lane; asked for before the data, and used after them.
struct EpScales {
  static constexpr int kCount = 2;  // rounds of 32 blocks that wait in registers
  const float* from;
  i64 stride;
  int begin, end;
  float first[kCount];

  __device__ __forceinline__ EpScales(const float* scales, i64 scale_stride, EpRange cols)
      : from(scales),
        stride(scale_stride),
        begin(cols.begin / kQuantizeBlock),
        end(ceil_div(cols.end, kQuantizeBlock)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) first[i] = load(begin + i * 32);
  }
  __device__ __forceinline__ float load(int round) const {
    const int block = round + int(threadIdx.x) % 32;
    return block < end ? from[block * stride] : 0.0f;
  }
  template <class To>
  __device__ __forceinline__ void store(int round, float scale, const To& to) const {
    const int block = round + int(threadIdx.x) % 32;
    to.for_each_scales([&](float* place, i64 place_stride) {
      if (block < end) place[block * place_stride] = scale;
    });
  }
  template <class To>
  __device__ __forceinline__ void store_all(const To& to) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (begin + i * 32 < end) store(begin + i * 32, first[i], to);
    for (int round = begin + kCount * 32; round < end; round += 32) store(round, load(round), to);
  }
};

// BF16 to E4M3, as quantize does: 16 neighbouring lanes share a block.
template <class To>
__device__ __forceinline__ void ep_quantize_piece(i64 byte, bool inside, const EpVector& piece, bool pow2,
                                                  const To& to) {
  constexpr int kCount = 8, kLanesPerBlock = kQuantizeBlock / kCount;
  const int col = int(byte / 2);
  float x[kCount], amax = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = i % 2 ? ptx::bf16_hi(piece.word[i / 2]) : ptx::bf16_lo(piece.word[i / 2]);
    if (inside && fabsf(x[i]) < __uint_as_float(0x7f800000u)) amax = fmaxf(amax, fabsf(x[i]));
  }
#pragma unroll
  for (int distance = 1; distance < kLanesPerBlock; distance *= 2)
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, distance));
  float scale = fmaxf(__fdiv_rn(amax, kE4m3Max), kMinScale);
  if (pow2) scale = __uint_as_float(pow2_ceil_bits(__float_as_uint(scale)));
  const float inverse = __frcp_rn(scale);
  const auto encode = [&](int i) {
    return ptx::pack_e4m3(x[i] * inverse, x[i + 1] * inverse) |
           u32(ptx::pack_e4m3(x[i + 2] * inverse, x[i + 3] * inverse)) << 16;
  };
  const uint2 packed{encode(0), encode(4)};
  to.for_each_data([&](u8* place) {
    if (inside) *reinterpret_cast<uint2*>(place + col) = packed;
  });
  to.for_each_scales([&](float* place, i64 stride) {
    if (inside && threadIdx.x % kLanesPerBlock == 0) place[col / kQuantizeBlock * stride] = scale;
  });
}

// The columns of a row of data, with scales if it is E4M3.
template <class To>
__device__ __forceinline__ void ep_move_row(const EpDispatchParams& p, const u8* data, const float* scales,
                                            i64 scale_stride, EpRange cols, u8* ring, const To& to) {
  if (p.format == kEpBf16) {
    ep_copy_bytes(data, 2 * i64(cols.begin), 2 * i64(cols.end), ring, to);
    return;
  }
  const EpScales row_scales(scales, scale_stride, cols);
  ep_copy_bytes(data, cols.begin, cols.end, ring, to);
  row_scales.store_all(to);
}

// Of a token of this rank.
template <class To>
__device__ __forceinline__ void ep_move_own(const EpDispatchParams& p, i64 token, EpRange cols, u8* ring,
                                            const To& to) {
  const int size = p.x_format == kEpE4m3 ? 1 : 2;
  const u8* data = static_cast<const u8*>(p.x) + token * p.x_stride * size;
  if (p.x_format == p.format) {
    ep_move_row(p, data, p.x_scales + token * p.x_scale_stride_row, p.x_scale_stride_col, cols, ring, to);
  } else {
    ep_stream<kEpDispatchDepth>(
        data, 2 * i64(cols.begin), 2 * i64(cols.end), ring,
        [&](i64 at, bool inside, const EpVector& piece) { ep_quantize_piece(at, inside, piece, p.pow2_scales, to); });
  }
}

// --- sending --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void ep_send_tokens(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                               u8* ring) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32, parts = c.shape.parts;
  const EpRange tokens = ep_tokens_of_cta(c.num_tokens, blockIdx.x, c.shape.num_ctas);
  const int num_pieces = (tokens.end - tokens.begin) * parts;
  const int flag = (c.rank * c.shape.num_ctas + blockIdx.x) * kEpDispatchSendWarps + role.warp();
  const auto expert_of = [&](int i) {
    return i < num_pieces && lane < c.shape.topk ? ep_own_expert(p, tokens.begin + i / parts, lane) : -1;
  };
  int next_expert = expert_of(role.warp());
  for (int i = role.warp(); i < num_pieces; i += kEpDispatchSendWarps) {
    const int token = tokens.begin + i / parts, expert = next_expert;
    next_expert = expert_of(i + kEpDispatchSendWarps);
    const u64 peers = ep_ranks_of(c, expert) & ~(u64(1) << c.rank);
    if (peers == 0) continue;
    ep_move_own(p, token, ep_columns_of_part(c.shape.hidden, i % parts, parts), ring, EpSlots{op, token, peers});
    __syncwarp();
    if (lane == 0) {
      ptx::fence_acq_rel_sys();
      for (u64 left = peers; left != 0;)
        ptx::store_relaxed_sys(op.word(ep_pop(left), c.layout.token_flags, flag),
                               ep_flag(op.epoch, p.format, i / kEpDispatchSendWarps + 1));
    }
  }
}

__device__ __forceinline__ void ep_dispatch_send(const EpDispatchParams& p, const EpRole& role, int* vote, u8* ring,
                                                 int* smem) {
  const EpOperation op(p.c, kEpDispatchSend);
  if (!ep_wait_for_credits(op, role, kEpPhaseDispatchCredit, p.c.layout.dispatch_credit, vote)) return;
  if (p.route) ep_send_routing(p, op, role, smem);
  if (p.copy) ep_send_tokens(p, op, role, ring);
  ep_finish(op, role, 0);
}

// --- receiving ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void ep_write_padding(const EpDispatchParams& p, const EpRole& role,
                                                 const EpRouteState& state) {
  const int lane = threadIdx.x % 32, hidden = p.c.shape.hidden, size = p.format == kEpE4m3 ? 1 : 2;
  for (int e = blockIdx.x; e < ep_num_local_experts(p.c); e += p.c.shape.num_ctas) {
    const int end = min_of(state.offsets[e + 1], p.capacity);
    for (i64 row = state.offsets[e] + state.counts[e] + role.warp(); row < end; row += role.num_warps) {
      u8* data = static_cast<u8*>(p.rows) + row * p.row_stride * size;
      for (int at = lane * 16; at < hidden * size; at += 32 * 16) *reinterpret_cast<EpVector*>(data + at) = {};
      for (int b = lane; p.row_scales && b < ceil_div(hidden, kQuantizeBlock); b += 32)
        p.row_scales[row + b * p.row_scale_stride] = 1;
      if (p.row_weights && lane == 0) p.row_weights[row] = 0;
    }
  }
}

// This CTA's tokens of one source to their rows.
__device__ __forceinline__ bool ep_receive_tokens(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                  int source, int num_tokens, u8* ring) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32, parts = c.shape.parts, size = p.format == kEpE4m3 ? 1 : 2;
  const EpRange tokens = ep_tokens_of_cta(num_tokens, blockIdx.x, c.shape.num_ctas);
  const int num_pieces = (tokens.end - tokens.begin) * parts;
  const int sender = role.warp() % kEpDispatchSendWarps;
  const u64* flag =
      op.word(c.rank, c.layout.token_flags, (source * c.shape.num_ctas + blockIdx.x) * kEpDispatchSendWarps + sender);
  const auto choice_of = [&](int i) { return ep_choice(c, source, tokens.begin + i / parts) + lane; };
  const auto row_of = [&](int i) {
    return i < num_pieces && lane < c.shape.topk ? c.handle[c.handle_layout.rows + choice_of(i)] : kEpNotHere;
  };
  int next_row = row_of(role.warp());
  u64 seen = 0;  // of the flag, by lane 0
  for (int i = role.warp(); i < num_pieces; i += role.num_warps) {
    const int token = tokens.begin + i / parts, part = i % parts, row = next_row;
    next_row = row_of(i + role.num_warps);
    const bool has_room = row >= 0 && row < p.capacity;
    const EpRows to{p, p.row_stride * size, row, __ballot_sync(0xffffffffu, has_room)};
    if (to.choices == 0) continue;
    if (p.row_weights && part == 0 && has_room)
      p.row_weights[row] = reinterpret_cast<const float*>(c.handle + c.handle_layout.weights)[choice_of(i)];
    const EpRange cols = ep_columns_of_part(c.shape.hidden, part, parts);
    if (source == c.rank) {
      ep_move_own(p, token, cols, ring, to);
      continue;
    }
    int fine = 1;
    const u64 expected = ep_flag(op.epoch, p.format, i / kEpDispatchSendWarps + 1);
    if (lane == 0 && seen < expected) {
      fine = ep_wait(op, kEpPhaseTokens, source, flag, expected);
      seen = ptx::load_acquire_sys(flag);
    }
    if (!__shfl_sync(0xffffffffu, fine, 0)) return false;
    const i64 at = i64(ep_peer_idx(c.rank, source)) * c.shape.max_tokens + token;
    const u8* slot = op.buffer(c.rank, c.layout.tokens) + at * c.layout.token_slot;
    ep_move_row(p, slot, reinterpret_cast<const float*>(slot + ep_scales_offset(c.shape.hidden)), 1, cols, ring, to);
  }
  return true;
}

__device__ __forceinline__ void ep_dispatch_receive(const EpDispatchParams& p, const EpRole& role, int* vote, u8* ring,
                                                    int* smem) {
  const EpCommon& c = p.c;
  const EpOperation op(c, kEpDispatchRecv);
  const EpRouteState state(smem, c.shape, ep_num_local_experts(c));
  if (!ep_receive_routing(p, op, role, state, vote)) return;
  if (p.copy) {
    ep_write_padding(p, role, state);
    bool fine = true;
    for (int i = 0; fine && i < c.shape.num_ranks; ++i) {  // its own first: the others' are on their way meanwhile
      const int source = (c.rank + i) % c.shape.num_ranks;
      fine = ep_receive_tokens(p, op, role, source, state.num_tokens[source], ring);
    }
    if (!role.all(fine, vote)) return;
  }
  ep_finish(op, role, c.layout.dispatch_credit);
}

__device__ __forceinline__ void ep_dispatch(const EpDispatchParams& p) {
  extern __shared__ __align__(16) u8 ep_smem[];  // rings, then what routing needs
  __shared__ int votes[2];
  if (threadIdx.x < 2) votes[threadIdx.x] = 0;
  __syncthreads();
  ptx::grid_wait_dependencies();
  u8* ring = ep_ring(ep_smem, kEpDispatchDepth);
  int* routing = reinterpret_cast<int*>(ep_smem + kEpDispatchRingBytes);
  const EpRole sender{1, 0, kEpDispatchSendWarps},
      receiver{2, kEpDispatchSendWarps, kEpDispatchWarps - kEpDispatchSendWarps};
  if (threadIdx.x < kEpDispatchSendWarps * 32) {
    if (p.c.send) ep_dispatch_send(p, sender, &votes[0], ring, routing);
  } else {
    if (p.c.recv) ep_dispatch_receive(p, receiver, &votes[1], ring, routing);
  }
}

}  // namespace phalanx
