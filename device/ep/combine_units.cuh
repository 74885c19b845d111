// What combine sums, in which order, and what of it a listing warp asks for ahead; combine.cuh says who does what.
#pragma once
#include "device/ep/combine_ring.cuh"

namespace phalanx {

// A token's rows on this rank: lane k has row and weight of choice k.
struct EpTerms {
  int row = kEpNotHere;
  float weight = 1;

  __device__ __forceinline__ bool has_row(const EpCombineParams& p) const { return row >= 0 && row < p.capacity; }
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
  return terms.has_row(p) ? p.row_values[terms.row] : 0.0f;
}

// Sends token by token, to each rank in turn; this rank's own tokens so many behind, as others' sums take a while to
// come.
constexpr int kEpLag = 4;

// A sum to be made, in the order in which they are: of token `step` of each source's, then of a token of this rank.
struct EpUnit {
  int step = 0, turn = 1;  // turns 1 to R - 1: other ranks'; R: this rank's, and then the step ends
  int sends, homes, lag;

  __device__ __forceinline__ EpUnit(const EpCombineParams& p, const EpRange* tokens)
      : sends(0), homes(p.c.recv ? tokens[p.c.rank].size() : 0) {
#pragma unroll 1
    for (int r = 0; p.c.send && r < p.c.shape.num_ranks; ++r)
      if (r != p.c.rank) sends = sends > tokens[r].size() ? sends : tokens[r].size();
    lag = min_of(sends, kEpLag);
  }
  __device__ __forceinline__ bool is_over() const { return step >= sends && step - lag >= homes; }
  __device__ __forceinline__ bool is_home(int num_ranks) const { return turn == num_ranks; }
  __device__ __forceinline__ int token() const { return step - lag; }  // of this rank's, if it is home's turn
  __device__ __forceinline__ void next(int num_ranks) {
    turn = turn == num_ranks ? 1 : turn + 1;
    if (turn == 1) ++step;
  }
};

// One unit's terms.
struct EpWork {
  int source = -1;  // none
  i64 token;
  EpTerms terms;
  int expert = -1;  // home: one a lane

  __device__ __forceinline__ EpWork(const EpCombineParams& p, const EpUnit& unit, const EpRange* tokens) {
    const int num_ranks = p.c.shape.num_ranks;
    const bool is_home = unit.is_home(num_ranks);
    const int next = p.c.rank + unit.turn, s = is_home ? p.c.rank : next < num_ranks ? next : next - num_ranks;
    const int i = is_home ? unit.token() : unit.step;
    if (unit.is_over() || (is_home ? i < 0 || i >= unit.homes : i >= unit.sends || i >= tokens[s].size())) return;
    source = s;
    token = tokens[s].begin + i;
  }
};

// The units that come next, their terms on the way to shared memory: a load takes longer than a unit.
struct EpOutlook {
  const EpCombineParams& p;
  EpCombineHalf& smem;
  EpUnit asked;  // the first whose terms have not been asked for
  int slot = 0;

  __device__ __forceinline__ EpOutlook(const EpCombineParams& params, EpCombineHalf& half, const EpUnit& first)
      : p(params), smem(half), asked(first) {
#pragma unroll 1
    for (int i = 0; i < kEpUnitsAhead; ++i) ask(i);
  }

  __device__ __forceinline__ void ask(int to) {
    if (!asked.is_over()) {
      const EpCommon& c = p.c;
      const int lane = threadIdx.x % 32;
      const EpWork work(p, asked, smem.tokens);
      if (work.source >= 0 && lane < c.shape.topk) {
        const i64 choice = ep_choice(c, work.source, work.token) + lane;
        ptx::cp_async_4(&smem.row[to][lane], &c.handle[c.handle_layout.rows + choice]);
        if (p.weighted) ptx::cp_async_4(&smem.row_weight[to][lane], &c.handle[c.handle_layout.weights + choice]);
        if (work.source == c.rank)
          ptx::cp_async_4(&smem.expert[to][lane],
                          &c.handle[c.handle_layout.experts + work.token * c.shape.topk + lane]);
      }
      asked.next(c.shape.num_ranks);
    }
    ptx::cp_async_commit_group();
  }

  // The terms of `unit`, the oldest asked for; another one is in their place.
  __device__ __forceinline__ EpWork take(const EpUnit& unit) {
    const int lane = threadIdx.x % 32;
    EpWork work(p, unit, smem.tokens);
    ptx::cp_async_wait_group<kEpUnitsAhead - 1>();
    if (work.source >= 0 && lane < p.c.shape.topk) {  // each lane has asked for its own
      work.terms.row = smem.row[slot][lane];
      if (p.weighted) work.terms.weight = smem.row_weight[slot][lane];
      if (work.source == p.c.rank) work.expert = smem.expert[slot][lane];
    }
    ask(slot);
    slot = slot + 1 == kEpUnitsAhead ? 0 : slot + 1;
    return work;
  }
};

}  // namespace phalanx
