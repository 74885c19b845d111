// Ranks entries by expert, then token, then choice: a counting sort whose order does not depend on who comes first.
//
//   count_entries    each warp counts the experts of its own piece of the entries, in shared memory
//   sum_counts       over the warps, then over the CTAs of the cluster: how many entries precede each warp's piece
//   lay_out_experts  counts give each expert its rows
//   place_entries    each warp goes through its piece again, 32 entries at a time: equal experts find each other by
//                    match.any, and are numbered from where the warp stands
//
// By whole CTAs of kWarps warps; a cluster shares the entries among its CTAs, a CTA without one takes them all.
#pragma once
#include "device/moe/config.h"
#include "device/moe/params.h"
#include "device/ptx/memory.cuh"
#include "device/ptx/sync.cuh"

namespace phalanx {

struct RouteSmem {
  int* warp_counts;  // [warps][experts]; after sum_counts: entries of the CTA before the warp's next one
  int* cta_counts;   // [experts]; read by the whole cluster
  int* earlier;      // [experts], entries in earlier CTAs
  int* counts;       // [experts], of all CTAs; after lay_out_experts: those that fit
  int* first;        // [experts + 1], rows

  __device__ RouteSmem(int* words, int num_warps, int num_experts)
      : warp_counts(words),
        cta_counts(words + num_warps * num_experts),
        earlier(cta_counts + num_experts),
        counts(earlier + num_experts),
        first(counts + num_experts) {}
};

// The expert of an entry, -1 for none. Without a branch, so that several can be on their way.
__device__ __forceinline__ int expert_of(const RouteParams& p, int entry) {
  const int token = p.by_topk.of(entry);
  const i64 at = token * p.topk_idx_stride + (entry - token * p.topk);
  const int* word = static_cast<const int*>(p.topk_idx) + (p.topk_idx_is_64 ? 2 * at : at);
  const int expert = word[0], upper = p.topk_idx_is_64 ? word[1] : 0;
  return expert >= 0 && expert < p.num_experts && upper == 0 ? expert : -1;
}

template <int kWarps>
__device__ EntryRange my_entries(const RouteParams& p, int cta_rank, int num_ctas) {
  return entries_of_warp(p.num_entries(), cta_rank * kWarps + int(threadIdx.x / 32), num_ctas * kWarps);
}

template <int kWarps>
__device__ void count_entries(const RouteParams& p, const RouteSmem& smem, EntryRange range) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kWarps * p.num_experts; i += kWarps * 32) smem.warp_counts[i] = 0;
  __syncthreads();
  int* counts = smem.warp_counts + threadIdx.x / 32 * p.num_experts;
  constexpr int kInFlight = 4;
  for (int begin = range.begin + int(threadIdx.x % 32); begin < range.end; begin += kInFlight * 32) {
    int expert[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) expert[j] = expert_of(p, min_of(begin + j * 32, range.end - 1));
#pragma unroll
    for (int j = 0; j < kInFlight; ++j)
      if (expert[j] >= 0 && begin + j * 32 < range.end)
        atomicAdd(&counts[expert[j]], 1);  // sums of integers do not depend on their order
  }
  __syncthreads();
}

// No CTA of the cluster may leave before all have come here; `cluster_wait` after it, or the end of `route`, sees to
// that.
template <int kWarps>
__device__ void sum_counts(const RouteParams& p, const RouteSmem& smem, u32 cta_rank, u32 num_ctas) {
  for (int e = threadIdx.x; e < p.num_experts; e += kWarps * 32) {
    int sum = 0;
#pragma unroll 8
    for (int warp = 0; warp < kWarps; ++warp) {
      int& count = smem.warp_counts[warp * p.num_experts + e];
      const int before = sum;
      sum += count;
      count = before;
    }
    smem.cta_counts[e] = smem.counts[e] = sum;
    smem.earlier[e] = 0;
  }
  if (num_ctas > 1) {
    ptx::cluster_sync();  // every CTA publishes its cta_counts, all read them
    for (int e = threadIdx.x; e < p.num_experts; e += kWarps * 32) {
      int sum = 0, earlier = 0;
#pragma unroll 8
      for (u32 rank = 0; rank < num_ctas; ++rank) {
        if (rank == cta_rank) earlier = sum;
        sum += int(ptx::load_cluster_u32(smem.cta_counts + e, rank));
      }
      smem.counts[e] = sum;
      smem.earlier[e] = earlier;
    }
    ptx::cluster_arrive();  // done reading: the waits are at the end of the kernel
  }
  __syncthreads();
}

__device__ __forceinline__ int warp_inclusive_sum(int x) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int below = __shfl_up_sync(~0u, x, d);
    if (int(threadIdx.x % 32) >= d) x += below;
  }
  return x;
}

// Where each expert's rows begin, and how many it gets. By the first warp, each lane for neighbouring experts.
// Returns, in that warp, how many rows a target without overflow has: masked, for each expert.
__device__ __forceinline__ int lay_out_experts(const RouteParams& p, const RouteSmem& smem) {
  int needed = 0;
  if (threadIdx.x < 32) {
    const int per_lane = ceil_div(p.num_experts, 32);
    const int begin = min_of(int(threadIdx.x) * per_lane, p.num_experts);
    const int end = min_of(begin + per_lane, p.num_experts);
    int taken = 0, most = 0;
#pragma unroll 1
    for (int e = begin; e < end; ++e) {
      taken += rows_taken(p.target, smem.counts[e]);
      most = most < smem.counts[e] ? smem.counts[e] : most;
    }
    const int up_to_here = warp_inclusive_sum(taken);
    needed = p.target.masked() ? __reduce_max_sync(~0u, most) : __shfl_sync(~0u, up_to_here, 31);
    taken = up_to_here - taken;
#pragma unroll 1
    for (int e = begin; e < end; ++e) {
      const int count = smem.counts[e];
      smem.first[e] = first_row(p.target, e, taken);
      smem.counts[e] = rows_that_fit(p.target, smem.first[e], count);
      taken += rows_taken(p.target, count);
    }
    if (threadIdx.x == 31) smem.first[p.num_experts] = first_row(p.target, p.num_experts, up_to_here);
  }
  __syncthreads();
  return needed;
}

// Calls use(entry, row) for every entry of the range, with row -1 for those that have none. By whole warps.
template <class Use>
__device__ void place_entries(const RouteParams& p, const RouteSmem& smem, EntryRange range, const Use& use) {
  const int lane = threadIdx.x % 32;
  int* next = smem.warp_counts + threadIdx.x / 32 * p.num_experts;
  int upcoming = range.begin + lane < range.end ? expert_of(p, range.begin + lane) : -1;
  for (int entry = range.begin + lane; entry - lane < range.end; entry += 32) {
    const int expert = upcoming;
    upcoming = entry + 32 < range.end ? expert_of(p, entry + 32) : -1;
    const u32 equals = __match_any_sync(~0u, expert);
    const int rank = __popc(equals & ((1u << lane) - 1));
    int row = -1;
    if (expert >= 0) {
      const int position = smem.earlier[expert] + next[expert] + rank;
      if (position < smem.counts[expert]) row = smem.first[expert] + position;
    }
    __syncwarp();  // all have read `next` before the first of each expert moves it
    if (expert >= 0 && rank == 0) next[expert] += __popc(equals);
    __syncwarp();
    if (entry < range.end) use(entry, row);
  }
}

// Whether no entry has this row of the target.
__device__ __forceinline__ bool is_padding(const RouteParams& p, const RouteSmem& smem, int row) {
  int expert = 0;
  if (p.target.masked()) {
    expert = row / p.target.max_rows;
  } else {  // the last that begins at or before `row`: those that share its beginning are empty
    int end = p.num_experts + 1;
    while (end - expert > 1) {
      const int middle = (expert + end) / 2;
      (smem.first[middle] <= row ? expert : end) = middle;
    }
  }
  return expert == p.num_experts || row - smem.first[expert] >= smem.counts[expert];
}

template <int kWarps>
__device__ void store_layout(const RouteParams& p, const RouteSmem& smem, int needed) {
  for (int e = threadIdx.x; e <= p.num_experts; e += kWarps * 32) {
    if (e < p.num_experts) p.counts[e] = smem.counts[e];
    p.offsets[e] = smem.first[e];
  }
  if (threadIdx.x == 0) *p.needed = needed;
}

// --- kernel ----------------------------------------------------------------------------------------------------------

// One cluster, or one CTA.
__device__ __forceinline__ void route(const RouteParams& p) {
  constexpr int kWarps = kRouteThreads / 32;
  extern __shared__ int words[];
  const RouteSmem smem(words, kWarps, p.num_experts);
  const u32 cta_rank = blockIdx.x, num_ctas = gridDim.x;
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();

  const EntryRange range = my_entries<kWarps>(p, cta_rank, num_ctas);
  count_entries<kWarps>(p, smem, range);
  sum_counts<kWarps>(p, smem, cta_rank, num_ctas);
  const int needed = lay_out_experts(p, smem);
  if (cta_rank == 0) store_layout<kWarps>(p, smem, needed);
  place_entries(p, smem, range, [&](int entry, int row) {
    p.slots[entry] = row;
    if (row >= 0) p.sources[row] = entry;
  });
  const int num_threads = int(num_ctas) * kRouteThreads;
  for (int row = int(cta_rank * blockDim.x + threadIdx.x); row < p.target.num_rows; row += num_threads)
    if (is_padding(p, smem, row)) p.sources[row] = -1;
  if (num_ctas > 1) ptx::cluster_wait();  // others may still read this CTA's counts
}

}  // namespace phalanx
