// Combine: the rows of a token's experts, weighted and summed where they are, come home once a rank and are summed
// there.
//
//   sum_r[t] = bf16(sum over choices k of rank r, in order, of weight[t, k] * rows_r[row(t, k)])
//   out[t]   = bf16(sum over ranks r in order of sum_r[t], then + residual[t])
//
// in FP32, by FMA; a rank's sum for its own tokens is not rounded.
//
//   sending warps    rows of others' tokens --> sum --> the home's sum slots;   sum flags, one a warp
//   receiving warps  rows of this rank's tokens and slots behind their flags --> out;   all read --> credits
//
// The tokens of a CTA are those of its dispatch, and so are the slots' numbers. A warp sums kEpCombinePieces pieces a lane
// of each row before it goes on to the next columns. Rows come through shared memory: every thread keeps
// kEpCombineSteps of that on their way by cp.async, and reads back what it has copied itself, so that no barrier is needed.
#pragma once
#include "device/ep/signal.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/memory.cuh"

namespace phalanx {

// Eight neighbouring columns.
struct EpSum {
  float v[8];

  __device__ __forceinline__ void add(const EpVector& x, float weight) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __fmaf_rn(weight, ptx::bf16_lo(x.word[i]), v[2 * i]);
      v[2 * i + 1] = __fmaf_rn(weight, ptx::bf16_hi(x.word[i]), v[2 * i + 1]);
    }
  }
  __device__ __forceinline__ EpVector to_bf16() const {
    EpVector packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.word[i] = ptx::pack_bf16(v[2 * i], v[2 * i + 1]);
    return packed;
  }
};

// A token's rows on this rank: lane k has row and weight of choice k.
struct EpTerms {
  int row = kEpNotHere;
  float weight = 1;

  // Choices that have a row.
  __device__ __forceinline__ u32 choices(const EpCombineParams& p) const {
    return __ballot_sync(0xffffffffu, row >= 0 && row < p.capacity);
  }
  // Some choice is of an expert of this rank, whether its row found room or not.
  __device__ __forceinline__ bool is_here() const { return __any_sync(0xffffffffu, row != kEpNotHere); }
};

__device__ __forceinline__ EpTerms ep_terms(const EpCombineParams& p, int source, i64 token) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  EpTerms terms;
  if (lane >= c.shape.topk) return terms;
  const i64 choice = ep_choice(c, source, token) + lane;
  terms.row = c.handle[c.handle_layout.rows + choice];
  if (p.weighted) terms.weight = reinterpret_cast<const float*>(c.handle + c.handle_layout.weights)[choice];
  return terms;
}

// The value of the row in this lane.
__device__ __forceinline__ float ep_row_value(const EpCombineParams& p, const EpTerms& terms) {
  return terms.row >= 0 && terms.row < p.capacity ? p.row_values[terms.row] : 0.0f;
}

// What is added up for a token, in order: lane j has term j. Those in [first_mine, last_mine], rows of this rank, make a
// sum of their own.
struct EpTermList {
  const u8* data = nullptr;
  float weight = 1;
  int count = 0, first_mine = -1, last_mine = -1;

  __device__ __forceinline__ void add(const u8* term_data, float term_weight) {
    if (int(threadIdx.x) % 32 == count) {
      data = term_data;
      weight = term_weight;
    }
    ++count;
  }
  __device__ __forceinline__ void add_rows(const EpCombineParams& p, const EpTerms& terms) {
#pragma unroll 1
    for (u32 left = terms.choices(p); left != 0;) {
      const int k = ep_pop(left);
      const i64 row = __shfl_sync(0xffffffffu, terms.row, k);
      const float row_weight = __shfl_sync(0xffffffffu, terms.weight, k);
      add(static_cast<const u8*>(p.rows) + row * p.row_stride * 2, row_weight);
    }
  }
  __device__ __forceinline__ void add_own_rows(const EpCombineParams& p, const EpTerms& terms) {
    if (terms.choices(p) == 0) return;
    first_mine = count;
    add_rows(p, terms);
    last_mine = count - 1;
  }
};

// Sums the columns into `out`, and the residual if there is one; `ring` is the thread's own shared memory. By a warp.
__device__ __noinline__ void ep_sum_terms(const EpTermList terms, EpRange cols, u8* ring, const u8* residual, u8* out) {
  constexpr int kPieces = kEpCombinePieces, kSteps = kEpCombineSteps;
  constexpr int kPieceCols = kEpPitch / 2, kStepCols = kPieces * kPieceCols;
  const int lane_col = int(threadIdx.x) % 32 * 8;
  int ahead_col = cols.begin + lane_col, ahead_term = 0, ahead_step = 0, step = 0;
  const auto fetch = [&] {
    const u64 data = __shfl_sync(0xffffffffu, reinterpret_cast<u64>(terms.data), ahead_term);
    const u8* from = reinterpret_cast<const u8*>(data) + 2 * i64(ahead_col);
    u8* to = ring + ahead_step * (kPieces * kEpPitch);
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (terms.count > 0 && ahead_col + i * kPieceCols < cols.end)
        ptx::cp_async_16(to + i * kEpPitch, from + i * kEpPitch);
    ptx::cp_async_commit_group();
    if (++ahead_step == kSteps) ahead_step = 0;
    if (++ahead_term >= terms.count) {
      ahead_term = 0;
      ahead_col += kStepCols;
    }
  };
#pragma unroll 1
  for (int i = 0; i < kSteps; ++i) fetch();
#pragma unroll 1
  for (int col = cols.begin + lane_col; col - lane_col < cols.end; col += kStepCols) {
    EpSum sum[kPieces] = {}, before[kPieces] = {};  // what other ranks' sums before this one's have come to
#pragma unroll 1
    for (int j = 0; j < terms.count; ++j) {
      if (j == terms.first_mine) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          before[i] = sum[i];
          sum[i] = {};
        }
      }
      const float weight = __shfl_sync(0xffffffffu, terms.weight, j);
      ptx::cp_async_wait_group<kSteps - 1>();
      const u8* from = ring + step * (kPieces * kEpPitch);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) sum[i].add(*reinterpret_cast<const EpVector*>(from + i * kEpPitch), weight);
      if (++step == kSteps) step = 0;
      fetch();
      if (j == terms.last_mine) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i)
#pragma unroll
          for (int n = 0; n < 8; ++n) sum[i].v[n] = before[i].v[n] + sum[i].v[n];
      }
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (col + i * kPieceCols >= cols.end) continue;
      const i64 at = 2 * i64(col) + i * kEpPitch;
      if (residual) sum[i].add(*reinterpret_cast<const EpVector*>(residual + at), 1.0f);
      *reinterpret_cast<EpVector*>(out + at) = sum[i].to_bf16();
    }
  }
  ptx::cp_async_wait_group<0>();  // the ring may be used again
}

__device__ __forceinline__ EpFormat ep_sums_format(const EpCombineParams& p) {
  return p.values ? kEpSumsAndValues : kEpSums;
}

// --- sending --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void ep_send_sums(const EpCombineParams& p, const EpOperation& op, const EpRole& role,
                                             int source, u8* ring) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  const EpPieces pieces =
      ep_pieces(c.shape, ep_tokens_of_cta(c.handle[c.handle_layout.num_tokens + source], blockIdx.x, c.shape.num_ctas));
#pragma unroll 1
  for (int i = role.warp(); i < pieces.count(); i += kEpSendWarps) {
    const int token = pieces.token(i);
    const EpTerms terms = ep_terms(p, source, token);
    if (terms.is_here()) {
      const i64 at = i64(ep_peer_idx(source, c.rank)) * c.shape.max_tokens + token;
      u8* slot = op.buffer(source, c.layout.sums) + at * c.layout.sum_slot;
      EpTermList list;
      list.add_rows(p, terms);
      ep_sum_terms(list, pieces.cols(i), ring, nullptr, slot);
      if (p.values && pieces.part(i) == 0 && lane < c.shape.topk)
        reinterpret_cast<float*>(slot + ep_bf16_bytes(c.shape.hidden))[lane] = ep_row_value(p, terms);
    }
    ep_tell(op, {source, source + 1}, c.layout.sum_flags, ep_sums_format(p), i, pieces.count());
  }
}

__device__ __forceinline__ void ep_combine_send(const EpCombineParams& p, const EpRole& role, int* vote, u8* ring) {
  const EpCommon& c = p.c;
  const EpOperation op(c, kEpCombineSend);
  if (!ep_wait_for_credits(op, role, kEpPhaseCombineCredit, c.layout.combine_credit, vote)) return;
#pragma unroll 1
  for (int i = 1; i < c.shape.num_ranks; ++i) ep_send_sums(p, op, role, (c.rank + i) % c.shape.num_ranks, ring);
  ep_finish(op, role, 0);
}

// --- receiving ------------------------------------------------------------------------------------------------------

// Until every peer in `ranks` has sent piece i. By a warp.
__device__ __forceinline__ bool ep_wait_for_sums(const EpCombineParams& p, const EpOperation& op, u64 ranks, int i) {
  const EpCommon& c = p.c;
  bool fine = true;
#pragma unroll 1
  for (int r = threadIdx.x % 32; r < c.shape.num_ranks; r += 32) {
    if (r == c.rank || !(ranks >> r & 1)) continue;
    fine = fine && ep_wait_for_piece(op, kEpPhaseSums, r, c.layout.sum_flags, ep_sums_format(p), i);
  }
  __syncwarp();
  return __all_sync(0xffffffffu, fine);
}

__device__ __forceinline__ const u8* ep_sum_slot_of(const EpOperation& op, int r, i64 token) {
  const EpCommon& c = op.c;
  return op.buffer(c.rank, c.layout.sums) +
         (i64(ep_peer_idx(c.rank, r)) * c.shape.max_tokens + token) * c.layout.sum_slot;
}

__device__ __forceinline__ void ep_write_sums(const EpCombineParams& p, const EpOperation& op, const EpTerms& terms,
                                              u64 ranks, i64 token, EpRange cols, u8* ring) {
  EpTermList list;
#pragma unroll 1
  for (u64 left = ranks; left != 0;) {
    const int r = ep_pop(left);
    if (r == op.c.rank)
      list.add_own_rows(p, terms);
    else
      list.add(ep_sum_slot_of(op, r, token), 1.0f);
  }
  const u8* residual = static_cast<const u8*>(p.residual);
  if (residual) residual += token * p.residual_stride * 2;
  ep_sum_terms(list, cols, ring, residual, static_cast<u8*>(p.out) + token * p.out_stride * 2);
}

// Lane k: what the rank that holds its choice says of its row.
__device__ __forceinline__ void ep_write_values(const EpCombineParams& p, const EpOperation& op, const EpTerms& terms,
                                                i64 token) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  if (lane >= c.shape.topk) return;
  const int expert = c.handle[c.handle_layout.experts + token * c.shape.topk + lane];
  const int r = expert < 0 ? -1 : ep_rank_of(c.first_expert, c.shape.num_ranks, expert);
  float value = 0;
  if (r == c.rank) value = ep_row_value(p, terms);
  if (r >= 0 && r != c.rank)
    value = reinterpret_cast<const float*>(ep_sum_slot_of(op, r, token) + ep_bf16_bytes(c.shape.hidden))[lane];
  p.topk_values[token * c.shape.topk + lane] = value;
}

__device__ __forceinline__ bool ep_receive_sums(const EpCombineParams& p, const EpOperation& op, const EpRole& role,
                                                u8* ring) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  const EpPieces pieces = ep_pieces(c.shape, ep_tokens_of_cta(c.num_tokens, blockIdx.x, c.shape.num_ctas));
  const auto token_of = [&](int i) { return pieces.token(min_of(i, pieces.count() - 1)); };
  const auto expert_of = [&](int i) {
    return lane < c.shape.topk ? c.handle[c.handle_layout.experts + i64(token_of(i)) * c.shape.topk + lane] : -1;
  };
  EpTerms next_terms;
  int next_expert = -1;
  if (role.warp() < pieces.count()) {
    next_terms = ep_terms(p, c.rank, token_of(role.warp()));
    next_expert = expert_of(role.warp());
  }
#pragma unroll 1
  for (int i = role.warp(); i < pieces.count(); i += role.num_warps) {
    const u64 ranks = ep_ranks_of(c, next_expert);
    const EpTerms terms = next_terms;
    next_terms = ep_terms(p, c.rank, token_of(i + role.num_warps));
    next_expert = expert_of(i + role.num_warps);
    if (!ep_wait_for_sums(p, op, ranks, i)) return false;
    ep_write_sums(p, op, terms, ranks, pieces.token(i), pieces.cols(i), ring);
    // Values come with the first piece of a token.
    if (p.values && pieces.part(i) == 0) ep_write_values(p, op, terms, pieces.token(i));
  }
  return true;
}

__device__ __forceinline__ void ep_combine_receive(const EpCombineParams& p, const EpRole& role, int* vote, u8* ring) {
  const EpOperation op(p.c, kEpCombineRecv);
  if (!role.all(ep_receive_sums(p, op, role, ring), vote)) return;
  ep_finish(op, role, p.c.layout.combine_credit);
}

__device__ __forceinline__ void ep_combine(const EpCombineParams& p) {
  extern __shared__ __align__(16) u8 ep_smem[];
  __shared__ int votes[2];
  if (threadIdx.x < 2) votes[threadIdx.x] = 0;
  __syncthreads();
  ptx::grid_wait_dependencies();
  u8* ring = ep_smem + threadIdx.x / 32 * (kEpCombineSteps * kEpCombinePieces * kEpPitch) + threadIdx.x % 32 * 16;
  const EpRole sender{1, 0, kEpSendWarps}, receiver{2, kEpSendWarps, kEpCombineWarps - kEpSendWarps};
  if (threadIdx.x < kEpSendWarps * 32) {
    if (p.c.send) ep_combine_send(p, sender, &votes[0], ring);
  } else {
    if (p.c.recv) ep_combine_receive(p, receiver, &votes[1], ring);
  }
}

}  // namespace phalanx
