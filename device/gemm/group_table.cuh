// The caller's offsets, row groups or counts -> the table of groups that the schedulers walk, in shared memory, once
// per CTA.
//
//     all threads    load_spans      what the caller says, group by group
//     one warp       index_groups    clamped; of rows: empty groups dropped, tiles counted by a scan over the lanes
//
// Every CTA comes to the same table. Who says what is impossible is told through a word of the host's, by CTA 0.
#pragma once
#include "device/gemm/groups.h"

namespace phalanx {

__device__ __forceinline__ void report_fault(const GroupParams& g, int index, int value) {
  if (blockIdx.x == 0) *static_cast<volatile u64*>(g.fault) = encode(GroupFault{g.by, index, value});
}

// table[i] = {pieces, begin, end, -} of group i, unchecked. Ends with a barrier of the whole CTA.
__device__ inline void load_spans(const GroupParams& g, GroupEntry* table) {
#pragma unroll 1
  for (int i = threadIdx.x; i < g.num_groups; i += blockDim.x) {
    GroupEntry e{1, 0, 0, 0};
    if (g.bounds == nullptr)
      e.end = g.limit;  // one group of everything
    else if (g.by == GroupsBy::offsets)
      e.begin = g.bounds[i], e.end = g.bounds[i + 1];
    else if (g.by == GroupsBy::counts)
      e.end = g.bounds[i];
    else
      e.group = 0;
    table[i] = e;
  }
  __syncthreads();
  if (g.by != GroupsBy::row_groups) return;
#pragma unroll 4
  for (int i = threadIdx.x; i < g.limit; i += blockDim.x) {
    const int group = g.bounds[i], previous = i > 0 ? g.bounds[i - 1] : -1,
              next = i + 1 < g.limit ? g.bounds[i + 1] : -1;
    if (group == -1) continue;
    if (group < 0 || group >= g.num_groups) {
      report_fault(g, i, group);
      continue;
    }
    if (previous != group) table[group].begin = i, atomicAdd(&table[group].group, 1);
    if (next != group) table[group].end = i + 1;
  }
  __syncthreads();
}

// One warp. Groups of rows: `height` x N cluster tiles of which `tiles_n` lie side by side; returns how many tiles
// there are in all. With height 0, groups of columns: every group keeps its entry.
__device__ inline int index_groups(const GroupParams& g, GroupEntry* table, int height, int tiles_n) {
  const int lane = threadIdx.x % 32;
  int num_entries = 0, num_tiles = 0, reached = 0;  // by the groups before these 32
#pragma unroll 1
  for (int first = 0; first < g.num_groups; first += 32) {
    const int group = first + lane;
    const GroupEntry said = group < g.num_groups ? table[group] : GroupEntry{1, 0, 0, 0};
    int begin = said.begin, end = said.end;
    if (g.by == GroupsBy::offsets) {  // each begins where the one before ends: bounds never decrease
      begin = max(min(begin, g.limit), reached);
#pragma unroll 1
      for (int distance = 1; distance < 32; distance *= 2) {
        const int before = __shfl_up_sync(0xffffffff, begin, distance);
        if (lane >= distance) begin = max(begin, before);
      }
    } else if (said.group != 1) {  // in pieces: left out; or in none
      begin = end = 0;
    }
    end = max(min(end, g.limit), begin);
    if (group < g.num_groups) {
      if (g.by == GroupsBy::row_groups) {
        if (said.group > 1) report_fault(g, said.begin, group);
      } else if (begin != said.begin) {
        report_fault(g, group, said.begin);
      } else if (end != said.end) {
        report_fault(g, g.by == GroupsBy::offsets ? group + 1 : group, said.end);
      }
    }
    reached = __shfl_sync(0xffffffff, end, 31);

    if (height == 0) {
      if (group < g.num_groups) table[group] = {group, begin, end, 0};
      continue;
    }
    const int tiles = ceil_div(end - begin, height) * tiles_n;
    int upto = tiles;  // tiles of lanes 0 .. lane
#pragma unroll 1
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(0xffffffff, upto, distance);
      if (lane >= distance) upto += before;
    }
    const u32 nonempty = __ballot_sync(0xffffffff, begin < end);
    __syncwarp();  // all lanes have read their entries, which may now be overwritten
    if (begin < end)
      table[num_entries + __popc(nonempty & ((1u << lane) - 1))] = {group, begin, end, num_tiles + upto - tiles};
    num_entries += __popc(nonempty);
    num_tiles += __shfl_sync(0xffffffff, upto, 31);
  }
  if (height > 0 && lane == 0) table[num_entries] = {0, 0, 0, num_tiles};
  return num_tiles;
}

}  // namespace phalanx
