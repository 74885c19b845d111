// Tokens to their experts: rows[slots[t, k]] = x[t] for every choice that has a row; padding rows become zeros.
//
//   some CTAs    a row a thread, 1 KB of it a CTA: clear those that have no source; with scales, move 8 columns of them. A thread
//                fetches the scale of its row's token: rows lie side by side in a column, so that writes are whole lines.
//                They come before the last that move tokens, which hide that they are slow
//   the others   a piece of a token each, 16 bytes a thread: read once, written to all of its rows
//
// Bytes are moved as they are. Bound by memory, or for few rows by latency: hence roles side by side, short code, and
// no loops over tasks.
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

// Clears the vectors [first, end) of those of the 32 rows from `begin` on whose lane says so. By a whole warp.
__device__ __forceinline__ void clear_rows(const ExpertRows& rows, int begin, bool clear, int first, int end) {
  for (u32 left = __ballot_sync(~0u, clear); left; left &= left - 1) {
    uint4* row = reinterpret_cast<uint4*>(rows.data + (begin + __ffs(left) - 1) * rows.stride);
#pragma unroll 1
    for (int i = first + int(threadIdx.x % 32); i < end; i += 32) row[i] = make_uint4(0, 0, 0, 0);
  }
}

__device__ __forceinline__ float* scale_row(const PermuteParams& p, int row) {
  const int expert = p.rows_per_expert.of(row);
  return p.scales + expert * p.scale_stride_expert + p.rows_per_expert.rest(row) * p.scale_stride_row;
}

// What a thread sees to that is none of a token's: its row, and which of the row's groups of vectors.
struct RowTask {
  int row, group, source;  // of rows that do not exist the source is 0

  // `task` counts the CTAs that see to rows.
  __device__ __forceinline__ RowTask(const ExpertRows& rows, int task) {
    const int block = rows.groups.of(task);
    group = task - block * rows.groups.value;
    row = block * int(blockDim.x) + int(threadIdx.x);
    source = row < rows.num_rows ? rows.sources[row] : 0;
  }
  __device__ __forceinline__ void clear_padding(const ExpertRows& rows) const {
    const int first = group * kClearedVectors;
    clear_rows(rows, row - int(threadIdx.x % 32), source < 0, first, min_of(first + kClearedVectors, rows.row_vectors));
  }
};

// A thread's row, from the column `first` on.
__device__ __forceinline__ void gather_scales(const PermuteParams& p, int row, int source, int first) {
  const float* in = p.x_scales + p.by_topk.of(source) * p.x_scale_stride_row + first * p.x_scale_stride_col;
  float* out = scale_row(p, row) + first * p.scale_stride_col;
  float scale[kScaleColumns];
#pragma unroll
  for (int i = 0; i < kScaleColumns; ++i)
    scale[i] = source >= 0 && first + i < p.num_scales ? in[i * p.x_scale_stride_col] : 1.0f;
#pragma unroll
  for (int i = 0; i < kScaleColumns; ++i)
    if (first + i < p.num_scales) out[i * p.scale_stride_col] = scale[i];
}

// --- kernels ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void permute(const PermuteParams& p) {
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();
  const int row_cta = int(blockIdx.x) - p.rows.first_cta;
  if (row_cta < 0 || row_cta >= p.rows.num_ctas) {
    const int cta = row_cta < 0 ? blockIdx.x : blockIdx.x - p.rows.num_ctas;
    const int token = p.pieces.of(cta), vector = p.pieces.rest(cta) * int(blockDim.x) + int(threadIdx.x);
    if (vector < p.rows.row_vectors) scatter_vector(p, token, p.slots + i64(token) * p.topk, vector);
    return;
  }
  const RowTask task(p.rows, row_cta);
  if (p.num_scales > 0 && task.row < p.rows.num_rows && (task.source >= 0 || p.rows.zero_padding))
    gather_scales(p, task.row, task.source, task.group * kScaleColumns);
  if (p.rows.zero_padding) task.clear_padding(p.rows);
}

}  // namespace phalanx
