// Tokens to their experts: rows[slots[t, k]] = x[t] for every choice that has a row; padding rows become zeros.
//
//   data      a warp reads 2 KB of a token once and writes them to all of its rows
//   padding   a warp looks at 32 rows and clears those that have no source
//   scales    a lane fetches the scale of its row's token: rows lie side by side in a column, so that writes are whole lines
//
// Bytes are moved as they are. Bound by memory.
#pragma once
#include "device/moe/config.h"
#include "device/moe/params.h"
#include "device/moe/route.cuh"
#include "device/ptx/sync.cuh"

namespace phalanx {

// `slot` is that of the lane's choice. By a whole warp.
__device__ __forceinline__ void scatter_piece(const PermuteParams& p, int token, int piece, int slot) {
  const int first = piece * kPermutePieceVectors + int(threadIdx.x % 32);
  const uint4* x = reinterpret_cast<const uint4*>(p.x + token * p.x_stride);
  uint4 v[kPermuteVectors];
#pragma unroll
  for (int j = 0; j < kPermuteVectors; ++j)
    if (first + j * 32 < p.rows.row_vectors) v[j] = x[first + j * 32];
  for (int k = 0; k < p.topk; ++k) {
    const int row = __shfl_sync(~0u, slot, k);
    if (row < 0) continue;
    uint4* out = reinterpret_cast<uint4*>(p.rows.data + row * p.rows.stride);
#pragma unroll
    for (int j = 0; j < kPermuteVectors; ++j)
      if (first + j * 32 < p.rows.row_vectors) out[first + j * 32] = v[j];
  }
}

// Clears, of the 32 rows from `begin` on, those whose lane says so. By a whole warp.
__device__ __forceinline__ void clear_rows(const ExpertRows& rows, int begin, bool clear) {
  for (u32 left = __ballot_sync(~0u, clear); left; left &= left - 1) {
    uint4* row = reinterpret_cast<uint4*>(rows.data + (begin + __ffs(left) - 1) * rows.stride);
    for (int i = threadIdx.x % 32; i < rows.row_vectors; i += 32) row[i] = make_uint4(0, 0, 0, 0);
  }
}

// Clears padding rows; the grid's warps share them.
__device__ __forceinline__ void clear_padding(const ExpertRows& rows) {
  if (!rows.zero_padding) return;
  const int lane = threadIdx.x % 32;
  const int warp = int(threadIdx.x / 32 * gridDim.x + blockIdx.x), num_warps = int(gridDim.x * blockDim.x / 32);
  for (int begin = warp * 32; begin < rows.num_rows; begin += num_warps * 32)
    clear_rows(rows, begin, begin + lane < rows.num_rows && rows.sources[begin + lane] < 0);
}

__device__ __forceinline__ float* scale_row(const PermuteParams& p, int row) {
  const int expert = row / p.rows_per_expert;
  return p.scales + expert * p.scale_stride_expert + (row - expert * p.rows_per_expert) * p.scale_stride_row;
}

// A warp's share: 128 rows, 8 columns.
__device__ __forceinline__ void gather_scales(const PermuteParams& p) {
  constexpr int kRowsPerLane = 4, kColumns = 8;
  const int warp = int(threadIdx.x / 32 * gridDim.x + blockIdx.x), num_warps = int(gridDim.x * blockDim.x / 32);
  const int column_groups = ceil_div(p.num_scales, kColumns);
  const int num_pieces = ceil_div(p.rows.num_rows, 32 * kRowsPerLane) * column_groups;
  for (int piece = warp; piece < num_pieces; piece += num_warps) {
    const int begin = piece / column_groups * 32 * kRowsPerLane + int(threadIdx.x % 32);
    const int first_column = piece % column_groups * kColumns;
#pragma unroll
    for (int j = 0; j < kRowsPerLane; ++j) {
      const int row = begin + j * 32;
      if (row >= p.rows.num_rows) break;
      const int source = p.rows.sources[row];
      if (source < 0 && !p.rows.zero_padding) continue;
      const float* in = p.x_scales + source / p.topk * p.x_scale_stride_row;
      float* out = scale_row(p, row);
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int column = first_column + i;
        if (column < p.num_scales)
          out[column * p.scale_stride_col] = source < 0 ? 1.0f : in[column * p.x_scale_stride_col];
      }
    }
  }
}

// --- kernels ------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void permute(const PermuteParams& p) {
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();
  const int lane = threadIdx.x % 32;
  const int pieces = ceil_div(p.rows.row_vectors, kPermutePieceVectors);
  const i64 num_tasks = i64(p.num_tokens) * pieces, step = i64(gridDim.x) * (kPermuteThreads / 32);
  // Neighbouring warps of a CTA take neighbouring pieces of a token.
  for (i64 task = i64(blockIdx.x) * (kPermuteThreads / 32) + threadIdx.x / 32; task < num_tasks; task += step) {
    const int token = int(task / pieces);
    scatter_piece(p, token, int(task - i64(token) * pieces), lane < p.topk ? p.slots[token * p.topk + lane] : -1);
  }
  if (p.num_scales > 0) gather_scales(p);
  clear_padding(p.rows);
}

// A CTA for each token, or several. Each ranks all entries by itself rather than wait for another kernel.
__device__ __forceinline__ void route_and_permute(const RouteAndPermuteParams& params) {
  const RouteParams& r = params.route;
  const PermuteParams& p = params.permute;
  constexpr int kWarps = kFusedThreads / 32;
  extern __shared__ int words[];
  __shared__ int slots[kMaxFusedEntries];
  const RouteSmem smem(words, kWarps, r.num_experts);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();

  if (blockIdx.x < p.num_tokens)  // on its way while the entries are ranked
    for (int i = threadIdx.x; i < p.rows.row_vectors; i += kFusedThreads)
      if (i % 8 == 0) ptx::prefetch_l2(p.x + blockIdx.x * p.x_stride + i * 16);
  const EntryRange range = my_entries<kWarps>(r, 0, 1);
  count_entries<kWarps>(r, smem, range);
  sum_counts<kWarps>(r, smem, 0, 1);
  const int needed = lay_out_experts(r, smem);
  if (blockIdx.x == 0) store_layout<kWarps>(r, smem, needed);
  place_entries(r, smem, range, [&](int entry, int row) {
    slots[entry] = row;
    if (blockIdx.x != 0) return;
    r.slots[entry] = row;
    if (row >= 0) r.sources[row] = entry;
  });
  __syncthreads();

  const int pieces = ceil_div(p.rows.row_vectors, kPermutePieceVectors);
  for (int token = blockIdx.x; token < p.num_tokens; token += gridDim.x) {
    for (int piece = warp; piece < pieces; piece += kWarps)
      scatter_piece(p, token, piece, lane < p.topk ? slots[token * p.topk + lane] : -1);
    for (int i = threadIdx.x; i < p.num_scales * p.topk; i += kFusedThreads) {
      const int column = i / p.topk, row = slots[token * p.topk + i - column * p.topk];
      if (row >= 0)
        scale_row(p, row)[column * p.scale_stride_col] =
            p.x_scales[token * p.x_scale_stride_row + column * p.x_scale_stride_col];
    }
  }
  for (int begin = int(warp * gridDim.x + blockIdx.x) * 32; begin < r.target.num_rows;
       begin += gridDim.x * kWarps * 32) {
    const int row = begin + lane;
    const bool padding = row < r.target.num_rows && is_padding(r, smem, row);
    if (padding) r.sources[row] = -1;
    if (!p.rows.zero_padding) continue;
    clear_rows(p.rows, begin, padding);
    if (padding)
      for (int column = 0; column < p.num_scales; ++column) scale_row(p, row)[column * p.scale_stride_col] = 1;
  }
}

}  // namespace phalanx
