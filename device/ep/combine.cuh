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
// The tokens of a CTA are those of its dispatch, and so are the slots' numbers. Rows come through shared memory: every
// thread keeps kEpCombineDepth pieces on their way by cp.async, and reads back what it has copied itself, so that no
// barrier is needed.
#pragma once
#include "device/ep/signal.cuh"
#include "device/ep/stream.cuh"
#include "device/ptx/convert.cuh"

namespace phalanx {

// Eight neighbouring columns.
struct EpSum {
  float v[8];
};

__device__ __forceinline__ void ep_add(EpSum& sum, const EpVector& x, float weight) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum.v[2 * i] = __fmaf_rn(weight, ptx::bf16_lo(x.word[i]), sum.v[2 * i]);
    sum.v[2 * i + 1] = __fmaf_rn(weight, ptx::bf16_hi(x.word[i]), sum.v[2 * i + 1]);
  }
}

__device__ __forceinline__ EpVector ep_to_bf16(const EpSum& sum) {
  EpVector packed;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed.word[i] = ptx::pack_bf16(sum.v[2 * i], sum.v[2 * i + 1]);
  return packed;
}

// A token's rows on this rank: lane k has row and weight of choice k.
struct EpTerms {
  int row = kEpNotHere;
  float weight = 1;
  u32 choices = 0;       // that have a row
  bool is_here = false;  // some choice is of an expert of this rank, whether its row found room or not
};

__device__ __forceinline__ EpTerms ep_terms(const EpCombineParams& p, int source, i64 token) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  const i64 choice = ep_choice(c, source, token) + lane;
  EpTerms terms;
  if (lane < c.shape.topk) {
    terms.row = c.handle[c.handle_layout.rows + choice];
    if (p.weighted) terms.weight = reinterpret_cast<const float*>(c.handle + c.handle_layout.weights)[choice];
  }
  terms.choices = __ballot_sync(0xffffffffu, terms.row >= 0 && terms.row < p.capacity);
  terms.is_here = __ballot_sync(0xffffffffu, terms.row != kEpNotHere) != 0;
  return terms;
}

// The value of the row in this lane.
__device__ __forceinline__ float ep_row_value(const EpCombineParams& p, const EpTerms& terms) {
  return terms.row >= 0 && terms.row < p.capacity ? p.row_values[terms.row] : 0.0f;
}

// What is added up for a token: lane j has term j. Those in `mine` are rows of this rank, neighbours, and make a sum of
// their own.
struct EpTermList {
  const u8* data = nullptr;
  float weight = 1;
  int count = 0;
  u32 mine = 0;

  __device__ __forceinline__ void add(const u8* term_data, float term_weight, bool is_mine) {
    if (int(threadIdx.x) % 32 == count) {
      data = term_data;
      weight = term_weight;
    }
    if (is_mine) mine |= 1u << count;
    ++count;
  }
  __device__ __forceinline__ void add_rows(const EpCombineParams& p, const EpTerms& terms) {
    for (u32 left = terms.choices; left != 0;) {
      const int k = ep_pop(left);
      const i64 row = __shfl_sync(0xffffffffu, terms.row, k);
      const float row_weight = __shfl_sync(0xffffffffu, terms.weight, k);
      add(static_cast<const u8*>(p.rows) + row * p.row_stride * 2, row_weight, true);
    }
  }
};

// Calls emit(column, sum) for every piece of 8 columns of this lane; `ring` is the thread's own shared memory,
// kEpCombineDepth pieces a warp's width apart. All lanes take part.
template <class Emit>
__device__ __forceinline__ void ep_sum_terms(const EpTermList& terms, EpRange cols, u8* ring, const Emit& emit) {
  constexpr int kStep = kEpPitch / 2;  // columns of a warp's pieces
  const int lane_col = threadIdx.x % 32 * 8;
  const int last_mine = terms.mine ? 31 - __clz(int(terms.mine)) : 32;
  int ahead_col = cols.begin + lane_col, ahead_term = 0;
  u32 ahead_slot = 0, slot = 0;
  const auto fetch = [&] {
    const u64 data = __shfl_sync(0xffffffffu, reinterpret_cast<u64>(terms.data), ahead_term);
    if (ahead_col < cols.end && terms.count > 0)
      ptx::cp_async_16(ring + ahead_slot * kEpPitch, reinterpret_cast<const u8*>(data) + 2 * ahead_col);
    ptx::cp_async_commit_group();
    ahead_slot = (ahead_slot + 1) % kEpCombineDepth;
    if (++ahead_term >= terms.count) {
      ahead_term = 0;
      ahead_col += kStep;
    }
  };
  for (int i = 0; i < kEpCombineDepth; ++i) fetch();
  for (int first = cols.begin; first < cols.end; first += kStep) {
    EpSum total = {}, mine = {};
    for (int j = 0; j < terms.count; ++j) {
      ptx::cp_async_wait_group<kEpCombineDepth - 1>();
      const EpVector x = *reinterpret_cast<const EpVector*>(ring + slot * kEpPitch);
      slot = (slot + 1) % kEpCombineDepth;
      if (terms.mine >> j & 1) {
        ep_add(mine, x, __shfl_sync(0xffffffffu, terms.weight, j));
        if (j == last_mine) {
#pragma unroll
          for (int i = 0; i < 8; ++i) total.v[i] += mine.v[i];
        }
      } else {
        ep_add(total, x, 1.0f);
      }
      fetch();
    }
    if (first + lane_col < cols.end) emit(first + lane_col, total);
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
  const int lane = threadIdx.x % 32, parts = c.shape.parts, hidden = c.shape.hidden;
  const EpRange tokens = ep_tokens_of_cta(c.handle[c.handle_layout.num_tokens + source], blockIdx.x, c.shape.num_ctas);
  const int num_pieces = (tokens.end - tokens.begin) * parts;
  u64* flag =
      op.word(source, c.layout.sum_flags, (c.rank * c.shape.num_ctas + blockIdx.x) * kEpCombineSendWarps + role.warp());
  for (int i = role.warp(); i < num_pieces; i += kEpCombineSendWarps) {
    const int token = tokens.begin + i / parts, part = i % parts;
    const EpTerms terms = ep_terms(p, source, token);
    if (!terms.is_here) continue;
    const i64 at = i64(ep_peer_idx(source, c.rank)) * c.shape.max_tokens + token;
    u8* slot = op.buffer(source, c.layout.sums) + at * c.layout.sum_slot;
    const EpRange cols = ep_columns_of_part(hidden, part, parts);
    EpTermList list;
    list.add_rows(p, terms);
    ep_sum_terms(list, cols, ring,
                 [&](int col, const EpSum& sum) { *reinterpret_cast<EpVector*>(slot + 2 * col) = ep_to_bf16(sum); });
    if (p.values && part == 0 && lane < c.shape.topk)
      reinterpret_cast<float*>(slot + ep_bf16_bytes(hidden))[lane] = ep_row_value(p, terms);
    __syncwarp();
    if (lane == 0) {
      ptx::fence_acq_rel_sys();
      ptx::store_relaxed_sys(flag, ep_flag(op.epoch, ep_sums_format(p), i / kEpCombineSendWarps + 1));
    }
  }
}

__device__ __forceinline__ void ep_combine_send(const EpCombineParams& p, const EpRole& role, int* vote, u8* ring) {
  const EpCommon& c = p.c;
  const EpOperation op(c, kEpCombineSend);
  if (!ep_wait_for_credits(op, role, kEpPhaseCombineCredit, c.layout.combine_credit, vote)) return;
  for (int i = 1; i < c.shape.num_ranks; ++i) ep_send_sums(p, op, role, (c.rank + i) % c.shape.num_ranks, ring);
  ep_finish(op, role, 0);
}

// --- receiving ------------------------------------------------------------------------------------------------------

// Until every peer in `ranks` has sent piece i. By a warp.
__device__ __forceinline__ bool ep_wait_for_sums(const EpCombineParams& p, const EpOperation& op, u64 ranks, int i) {
  const EpCommon& c = p.c;
  bool fine = true;
  for (int r = threadIdx.x % 32; r < c.shape.num_ranks; r += 32) {
    if (r == c.rank || !(ranks >> r & 1)) continue;
    const int flag = (r * c.shape.num_ctas + blockIdx.x) * kEpCombineSendWarps + i % kEpCombineSendWarps;
    fine = fine && ep_wait(op, kEpPhaseSums, r, op.word(c.rank, c.layout.sum_flags, flag),
                           ep_flag(op.epoch, ep_sums_format(p), i / kEpCombineSendWarps + 1));
  }
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
  for (u64 left = ranks; left != 0;) {
    const int r = ep_pop(left);
    if (r == op.c.rank)
      list.add_rows(p, terms);
    else
      list.add(ep_sum_slot_of(op, r, token), 1.0f, false);
  }
  const u16* residual = static_cast<const u16*>(p.residual) + token * p.residual_stride;
  u16* out = static_cast<u16*>(p.out) + token * p.out_stride;
  ep_sum_terms(list, cols, ring, [&](int col, EpSum sum) {
    if (p.residual) ep_add(sum, *reinterpret_cast<const EpVector*>(residual + col), 1.0f);
    *reinterpret_cast<EpVector*>(out + col) = ep_to_bf16(sum);
  });
}

// Lane k: what the rank that holds its choice says of its row.
__device__ __forceinline__ void ep_write_values(const EpCombineParams& p, const EpOperation& op, const EpTerms& terms,
                                                i64 token, int expert) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  if (lane >= c.shape.topk) return;
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
  const int lane = threadIdx.x % 32, parts = c.shape.parts;
  const EpRange tokens = ep_tokens_of_cta(c.num_tokens, blockIdx.x, c.shape.num_ctas);
  const int num_pieces = (tokens.end - tokens.begin) * parts;
  for (int i = role.warp(); i < num_pieces; i += role.num_warps) {
    const int token = tokens.begin + i / parts, part = i % parts;
    const int expert = lane < c.shape.topk ? c.handle[c.handle_layout.experts + i64(token) * c.shape.topk + lane] : -1;
    const u64 ranks = ep_ranks_of(c, expert);
    const EpTerms terms = ep_terms(p, c.rank, token);
    if (!ep_wait_for_sums(p, op, ranks, i)) return false;
    ep_write_sums(p, op, terms, ranks, token, ep_columns_of_part(c.shape.hidden, part, parts), ring);
    if (p.values && part == 0) {
      // Values come with the first piece of a token.
      ep_write_values(p, op, terms, token, expert);
    }
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
  u8* ring = ep_ring(ep_smem, kEpCombineDepth);
  const EpRole sender{1, 0, kEpCombineSendWarps},
      receiver{2, kEpCombineSendWarps, kEpCombineWarps - kEpCombineSendWarps};
  if (threadIdx.x < kEpCombineSendWarps * 32) {
    if (p.c.send) ep_combine_send(p, sender, &votes[0], ring);
  } else {
    if (p.c.recv) ep_combine_receive(p, receiver, &votes[1], ring);
  }
}

}  // namespace phalanx
