// Few tokens to their experts in one kernel: a CTA for each, or for several, ranks all entries by itself rather than
// wait for another kernel, then moves its token. With kQuantize x is BF16, and quantised on the way as
// quantize_rows.cuh does: a thread takes 8 columns, 16 of them a block.
#pragma once
#include "device/moe/permute.cuh"
#include "device/quantize/encode.cuh"

namespace phalanx {

__device__ __forceinline__ void scatter_token(const PermuteParams& p, int token, const int* slots) {
  for (int vector = threadIdx.x; vector < p.rows.row_vectors; vector += kFusedThreads)
    scatter_vector(p, token, slots, vector);
#pragma unroll 1
  for (int i = threadIdx.x; i < p.num_scales * p.topk; i += kFusedThreads) {
    const int k = i / p.num_scales, column = i - k * p.num_scales, row = slots[k];
    if (row >= 0)
      scale_row(p, row)[column * p.scale_stride_col] =
          p.x_scales[token * p.x_scale_stride_row + column * p.x_scale_stride_col];
  }
}

__device__ __forceinline__ void quantize_token(const PermuteParams& p, const ScaledMatrix& q, int token,
                                               const int* slots) {
  using P = Piece<FloatType::bf16>;
  const int pieces = 2 * p.rows.row_vectors, lane = threadIdx.x % 32;
  for (int first = int(threadIdx.x) - lane; first < pieces; first += kFusedThreads) {  // by whole warps
    const int piece = first + lane, block = piece / P::kLanes;
    P x[1] = {};
    if (piece < pieces) load_vector<P::kBytes>(x[0].word, p.x + token * p.x_stride + piece * P::kBytes);
    u32 magnitude[1] = {finite_maximum(x[0])}, word[2];
    const float scale =
        scale_of(Magnitudes<FloatType::bf16>::value(max_over_lanes<P::kLanes>(magnitude)), /*pow2=*/false);
    encode(word, x[0], __frcp_rn(scale));
    if (piece >= pieces) continue;
    store_vector<8>(q.data + token * q.stride + piece * 8, word);
    const bool first_of_block = piece % P::kLanes == 0;
    if (first_of_block) q.scales[token * q.scale_stride_row + block * q.scale_stride_col] = scale;
#pragma unroll 4
    for (int k = 0; k < p.topk; ++k) {
      const int row = slots[k];
      if (row < 0) continue;
      store_vector<8>(p.rows.data + row * p.rows.stride + piece * 8, word);
      if (first_of_block) scale_row(p, row)[block * p.scale_stride_col] = scale;
    }
  }
}

// --- kernel ----------------------------------------------------------------------------------------------------------

template <bool kQuantize>
__device__ __forceinline__ void route_and_permute(const RouteAndPermuteParams& params) {
  const RouteParams& r = params.route;
  const PermuteParams& p = params.permute;
  constexpr int kWarps = kFusedThreads / 32;
  extern __shared__ int words[];
  __shared__ int slots[kMaxFusedEntries];
  const RouteSmem smem(words, kWarps, r.num_experts);
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();

  const int token_bytes = p.rows.row_vectors * (kQuantize ? 32 : 16);
  if (int(blockIdx.x) < p.num_tokens)  // on its way while the entries are ranked
    for (int i = threadIdx.x * 128; i < token_bytes; i += kFusedThreads * 128)
      ptx::prefetch_l2(p.x + blockIdx.x * p.x_stride + i);
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
    if constexpr (kQuantize)
      quantize_token(p, params.q, token, of_token);
    else
      scatter_token(p, token, of_token);
  }
  const int lane = threadIdx.x % 32, num_rows = r.target.num_rows;
  for (u32 next = (threadIdx.x / 32 * gridDim.x + blockIdx.x) * 32; next < u32(num_rows);  // one turn beyond 2^31 fits
       next += gridDim.x * kWarps * 32) {
    const int begin = int(next), row = begin + lane;
    const bool padding = row < num_rows && is_padding(r, smem, row);
    if (padding) r.sources[row] = -1;
    if (!p.rows.zero_padding) continue;
    clear_rows(p.rows, begin, padding, 0, p.rows.row_vectors);
    if (padding)
#pragma unroll 1
      for (int column = 0; column < p.num_scales; ++column) scale_row(p, row)[column * p.scale_stride_col] = 1;
  }
}

}  // namespace phalanx
