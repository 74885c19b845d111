// Tokens to their experts: rows[slots[t, k]] = x[t] for every choice that has a row; padding rows become zeros.
//
//   one CTA in so many   128 rows each: clear those that have no source; with scales, 8 columns of them each. A lane fetches
//                        the scale of its row's token: rows lie side by side in a column, so that writes are whole lines
//   the other CTAs       2 KB of a token each: read once, written to all of its rows
//
// Bytes are moved as they are. Bound by memory, or for few rows by latency: hence roles side by side, short code, and no loops
// over tasks.
#pragma once
#include "device/moe/config.h"
#include "device/moe/params.h"
#include "device/moe/route.cuh"
#include "device/ptx/sync.cuh"

namespace phalanx {

constexpr int kChoicesAtOnce = 8;

// Writes one vector of a token to its rows; `slots` are those of the token.
__device__ __forceinline__ void scatter_vector(const PermuteParams& p, int token, const int* slots, int vector) {
  const uint4 v = reinterpret_cast<const uint4*>(p.x + token * p.x_stride)[vector];
  for (int k = 0; k < p.topk; k += kChoicesAtOnce) {
    int row[kChoicesAtOnce];
#pragma unroll
    for (int i = 0; i < kChoicesAtOnce; ++i) row[i] = k + i < p.topk ? slots[k + i] : -1;
#pragma unroll
    for (int i = 0; i < kChoicesAtOnce; ++i)
      if (row[i] >= 0) reinterpret_cast<uint4*>(p.rows.data + row[i] * p.rows.stride)[vector] = v;
  }
}

// Clears, of the 32 rows from `begin` on, those whose lane says so. By a whole warp.
__device__ __forceinline__ void clear_rows(const ExpertRows& rows, int begin, bool clear) {
  for (u32 left = __ballot_sync(~0u, clear); left; left &= left - 1) {
    uint4* row = reinterpret_cast<uint4*>(rows.data + (begin + __ffs(left) - 1) * rows.stride);
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < rows.row_vectors; i += 32) row[i] = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ float* scale_row(const PermuteParams& p, int row) {
  const int expert = row / p.rows_per_expert;
  return p.scales + expert * p.scale_stride_expert + (row - expert * p.rows_per_expert) * p.scale_stride_row;
}

// A thread's row, from the column `first` on.
__device__ __forceinline__ void gather_scales(const PermuteParams& p, int row, int source, int first) {
  const float* in = p.x_scales + source / p.topk * p.x_scale_stride_row + first * p.x_scale_stride_col;
  float* out = scale_row(p, row) + first * p.scale_stride_col;
  float scale[kScaleColumns];
#pragma unroll
  for (int i = 0; i < kScaleColumns; ++i)
    scale[i] = source >= 0 && first + i < p.num_scales ? in[i * p.x_scale_stride_col] : 1.0f;
#pragma unroll
  for (int i = 0; i < kScaleColumns; ++i)
    if (first + i < p.num_scales) out[i * p.scale_stride_col] = scale[i];
}

// --- kernels ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void permute(const PermuteParams& p) {
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();
  const int cta = row_cta(blockIdx.x, p.rows.num_ctas, p.rows.cta_stride);
  if (cta < 0) {
    const int pieces = ceil_div(p.rows.row_vectors, kPermuteThreads), task = -1 - cta, token = task / pieces;
    const int vector = (task - token * pieces) * kPermuteThreads + int(threadIdx.x);
    if (vector < p.rows.row_vectors) scatter_vector(p, token, p.slots + i64(token) * p.topk, vector);
    return;
  }
  const int column_groups = p.num_scales > 0 ? ceil_div(p.num_scales, kScaleColumns) : 1;
  const int block = cta / column_groups, group = cta - block * column_groups;
  const int row = block * kPermuteThreads + int(threadIdx.x);
  const bool inside = row < p.rows.num_rows;
  const int source = inside ? p.rows.sources[row] : 0;
  if (p.num_scales > 0 && inside && (source >= 0 || p.rows.zero_padding))
    gather_scales(p, row, source, group * kScaleColumns);
  if (group == 0 && p.rows.zero_padding) clear_rows(p.rows, row - int(threadIdx.x % 32), source < 0);
}

// A CTA for each token, or several. Each ranks all entries by itself rather than wait for another kernel.
__device__ __forceinline__ void route_and_permute(const RouteAndPermuteParams& params) {
  const RouteParams& r = params.route;
  const PermuteParams& p = params.permute;
  constexpr int kWarps = kFusedThreads / 32;
  extern __shared__ int words[];
  __shared__ int slots[kMaxFusedEntries];
  const RouteSmem smem(words, kWarps, r.num_experts);
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();

  if (int(blockIdx.x) < p.num_tokens)  // on its way while the entries are ranked
    for (int i = threadIdx.x * 8; i < p.rows.row_vectors; i += kFusedThreads * 8)
      ptx::prefetch_l2(p.x + blockIdx.x * p.x_stride + i * 16);
  const EntryRange range = my_entries<kWarps>(r, 0, 1);
  count_entries<kWarps>(r, smem, range);
  sum_counts<kWarps>(r, smem, 0, 1);
  const int needed = lay_out_experts(r, smem);
  place_entries(r, smem, range, [&](int entry, int row) {
    slots[entry] = row;
    if (blockIdx.x != 0) return;
    r.slots[entry] = row;
    if (row >= 0) r.sources[row] = entry;
  });
  if (blockIdx.x == 0) store_layout<kWarps>(r, smem, needed);
  __syncthreads();

  for (int token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
    const int* of_token = slots + token * p.topk;
    for (int vector = threadIdx.x; vector < p.rows.row_vectors; vector += kFusedThreads)
      scatter_vector(p, token, of_token, vector);
#pragma unroll 1
    for (int i = threadIdx.x; i < p.num_scales * p.topk; i += kFusedThreads) {
      const int k = i / p.num_scales, column = i - k * p.num_scales, row = of_token[k];
      if (row >= 0)
        scale_row(p, row)[column * p.scale_stride_col] =
            p.x_scales[token * p.x_scale_stride_row + column * p.x_scale_stride_col];
    }
  }
  const int lane = threadIdx.x % 32, num_rows = r.target.num_rows;
  for (int begin = int(threadIdx.x / 32 * gridDim.x + blockIdx.x) * 32; begin < num_rows;
       begin += int(gridDim.x) * kWarps * 32) {
    const int row = begin + lane;
    const bool padding = row < num_rows && is_padding(r, smem, row);
    if (padding) r.sources[row] = -1;
    if (!p.rows.zero_padding) continue;
    clear_rows(p.rows, begin, padding);
    if (padding)
#pragma unroll 1
      for (int column = 0; column < p.num_scales; ++column) scale_row(p, row)[column * p.scale_stride_col] = 1;
  }
}

}  // namespace phalanx
