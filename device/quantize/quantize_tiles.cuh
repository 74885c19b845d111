// Quantisation to E4M3 by tiles of 128 x 128, each read once by a CTA and kept in registers:
//
//   blocks      a scale for the tile
//   transposed  a scale for each of its columns; E4M3 goes through shared memory, where rows become columns
//   both        transposed, and a scale for each of its rows
//
//   thread:     4 rows x 16 bytes (FP32: 8 rows); 16 neighbouring threads (32) hold as many rows of 128 columns
//
//                 x ──> registers ──> maxima of columns ──> shared: column_maxima, a line for each warp
//                           │                                  │ barrier: all lines are there
//                           │                      scale, inverse of column t by thread t
//                           │                                  │ barrier: inverses are there
//                           └──> 4 (8) rows of a column are as many bytes ──> shared: transposed tile
//                                                              │ barrier: the tile is complete
//                                              128 bytes of a column by 8 threads ──> q_t
#pragma once
#include "device/ptx/sync.cuh"
#include "device/quantize/encode.cuh"

namespace phalanx {

// A thread's place in a matrix of which it holds pieces P.
template <class P>
struct SquareTile {
  static constexpr int kRows = SquareTiles::rows_per_thread(P::kCount);

  i64 band;       // of 128 rows
  int block_col;  // of 128 columns
  i64 row;        // the first of this thread's rows
  int col;        // of this thread's pieces
  i64 rows;       // from `row` to the end
  int cols;       // from `col` to the end

  __device__ __forceinline__ SquareTile(i64 tile_row, int tile_col, int num_rows, int num_cols)
      : band(tile_row),
        block_col(tile_col),
        row(band * kQuantizeBlock + chunk() * kRows),
        col(block_col * kQuantizeBlock + int(threadIdx.x) % P::kLanes * P::kCount),
        rows(num_rows - row),
        cols(num_cols - col) {}
  // That of this CTA, row of tiles by row of tiles.
  static __device__ __forceinline__ SquareTile of_cta(int num_rows, int num_cols) {
    const u32 across = ceil_div(num_cols, kQuantizeBlock), band = blockIdx.x / across;
    return {i64(band), int(blockIdx.x - band * across), num_rows, num_cols};
  }
  // Which of the tile's groups of kRows rows.
  static __device__ __forceinline__ int chunk() { return int(threadIdx.x) / P::kLanes; }
};

// --- 128 x 128 -------------------------------------------------------------------------------------------------------

template <class P, int kRows>
__device__ __forceinline__ void quantize_block(const P (&x)[kRows], const SquareTile<P>& tile, const ScaledMatrix& q,
                                               bool vectors, bool pow2) {
  using M = Magnitudes<P::kType>;
  constexpr int kWarps = SquareTiles::kThreads / 32;
  __shared__ u32 warp_maximum[kWarps];
  u32 maximum = M::largest(
      finite_maximum<P::kType, kRows * P::kWords>([&](int i) { return x[i / P::kWords].word[i % P::kWords]; }));
  maximum = __reduce_max_sync(0xffffffffu, maximum);
  if (threadIdx.x % 32 == 0) warp_maximum[threadIdx.x / 32] = maximum;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) maximum = max(maximum, warp_maximum[i]);

  const float scale = scale_of(M::value(maximum), pow2), inverse = __frcp_rn(scale);
  if (threadIdx.x == 0) q.scales[tile.band * q.scale_stride_row + tile.block_col * q.scale_stride_col] = scale;
  u32 word[kRows][P::kCount / 4];
#pragma unroll
  for (int r = 0; r < kRows; ++r) encode(word[r], x[r], inverse);
  store_rows<1>(q.data + tile.row * q.stride + tile.col, word, q.stride, tile.rows, tile.cols, vectors);
}

// --- columns ---------------------------------------------------------------------------------------------------------

// Shared memory of quantize_columns.
template <class P>
struct ColumnSmem {
  static constexpr int kWarps = SquareTiles::kThreads / 32;
  // The largest magnitudes of each column, by warp; two columns to a word in 16-bit types.
  using Magnitude = typename Conditional<P::kType == FloatType::f32, u32, u16>::Type;
  alignas(16) Magnitude column_maxima[kWarps][kQuantizeBlock];
  alignas(16) float inverse[kQuantizeBlock];
  // 8 bytes are 8 rows of a column. Chunk k of column c lies at k ^ (c / kCount) % 16, so that neither the threads of
  // a warp that write to a chunk of 16 columns, nor those that read the chunks of one, meet in a bank.
  alignas(16) uint2 tile[kQuantizeBlock][16];

  static __device__ __forceinline__ int swizzle(int c) { return c / P::kCount % 16; }
};

template <class P, int kRows>
__device__ __forceinline__ void store_column_maxima(ColumnSmem<P>& smem, const P (&x)[kRows]) {
  u32 maxima[P::kWords];
#pragma unroll
  for (int w = 0; w < P::kWords; ++w) {
    maxima[w] = finite_maximum<P::kType, kRows>([&](int r) { return x[r].word[w]; });
    if constexpr (P::kLanes == 16)  // the other half of the warp has the next rows
      maxima[w] = Magnitudes<P::kType>::max(maxima[w], __shfl_xor_sync(0xffffffffu, maxima[w], 16));
  }
  const int lane = threadIdx.x % 32;
  if (lane >= P::kLanes) return;
  uint4* line = reinterpret_cast<uint4*>(smem.column_maxima[threadIdx.x / 32]) + lane * (P::kWords / 4);
#pragma unroll
  for (int w = 0; w < P::kWords; w += 4)
    line[w / 4] = make_uint4(maxima[w], maxima[w + 1], maxima[w + 2], maxima[w + 3]);
}

// The first 128 threads turn the maxima of a column each into its scale.
template <class P>
__device__ __forceinline__ void store_column_scales(ColumnSmem<P>& smem, const SquareTile<P>& tile,
                                                    const ScaledMatrix& q_t, int cols, bool pow2) {
  const int c = int(threadIdx.x);
  if (c >= kQuantizeBlock) return;
  u32 maximum = 0;
#pragma unroll
  for (int warp = 0; warp < ColumnSmem<P>::kWarps; ++warp) maximum = max(maximum, u32(smem.column_maxima[warp][c]));
  const float scale = scale_of(Magnitudes<P::kType>::value(maximum), pow2);
  smem.inverse[c] = __frcp_rn(scale);
  const i64 col = i64(tile.block_col) * kQuantizeBlock + c;
  if (col < cols) q_t.scales[col * q_t.scale_stride_row + tile.band * q_t.scale_stride_col] = scale;
}

// Neighbouring rows of a column are packed into neighbouring bytes.
template <class P, int kRows>
__device__ __forceinline__ void encode_columns(ColumnSmem<P>& smem, const P (&x)[kRows], const SquareTile<P>& tile) {
  if (tile.rows <= 0) return;
  const int first = int(threadIdx.x) % P::kLanes * P::kCount, byte = SquareTile<P>::chunk() * kRows;
  const int chunk = byte / 8 ^ ColumnSmem<P>::swizzle(first);
#pragma unroll
  for (int j = 0; j < P::kCount; ++j) {
    const float inverse = smem.inverse[first + j];
    const auto four_rows = [&](int r) {
      return encode_4(x[r][j] * inverse, x[r + 1][j] * inverse, x[r + 2][j] * inverse, x[r + 3][j] * inverse);
    };
    if constexpr (kRows == 8)
      smem.tile[first + j][chunk] = make_uint2(four_rows(0), four_rows(4));
    else
      reinterpret_cast<u32*>(&smem.tile[first + j][chunk])[byte / 4 % 2] = four_rows(0);
  }
}

// 128 bytes of a column by 8 threads.
template <class P>
__device__ __forceinline__ void store_columns(const ColumnSmem<P>& smem, const SquareTile<P>& tile,
                                              const ScaledMatrix& q_t, i64 rows, int cols) {
  const bool aligned = (reinterpret_cast<u64>(q_t.data) | u64(q_t.stride)) % 16 == 0;
  const int part = int(threadIdx.x) % 8;
  const i64 first_row = tile.band * kQuantizeBlock + part * 16, left = rows - first_row;
#pragma unroll
  for (int i = 0; i < kQuantizeBlock * 8; i += SquareTiles::kThreads) {
    const int c = (i + int(threadIdx.x)) / 8, swizzle = ColumnSmem<P>::swizzle(c);
    const i64 col = i64(tile.block_col) * kQuantizeBlock + c;
    if (col >= cols) continue;
    u8* out = q_t.data + col * q_t.stride + first_row;
    if (aligned && left >= 16) {
      const uint4 v = *reinterpret_cast<const uint4*>(&smem.tile[c][(2 * part) ^ (swizzle & ~1)]);
      *reinterpret_cast<uint4*>(out) = swizzle & 1 ? make_uint4(v.z, v.w, v.x, v.y) : v;
    } else {
#pragma unroll 1
      for (int b = 0; b < 16 && b < left; ++b)
        out[b] = reinterpret_cast<const u8*>(&smem.tile[c][(2 * part + b / 8) ^ swizzle])[b % 8];
    }
  }
}

// By all threads of the CTA.
template <class P, int kRows>
__device__ __forceinline__ void quantize_columns(ColumnSmem<P>& smem, P (&x)[kRows], const SquareTile<P>& tile,
                                                 const ScaledMatrix& q_t, i64 rows, int cols, bool pow2) {
  // What quantised rows before has unpacked x. Kept so until the columns' turn, it would take twice the registers.
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < P::kWords; ++i) ptx::keep_in_register(x[r].word[i]);
  store_column_maxima(smem, x);
  __syncthreads();  // column_maxima are complete
  store_column_scales(smem, tile, q_t, cols, pow2);
  __syncthreads();  // inverse is complete
  encode_columns(smem, x, tile);
  __syncthreads();  // the transposed tile is complete
  store_columns(smem, tile, q_t, rows, cols);
}

// --- kernel ----------------------------------------------------------------------------------------------------------

template <QuantizeConfig C>
__device__ __forceinline__ void quantize_tiles(const QuantizeParams& p) {
  using P = Piece<C.type>;
  const auto tile = SquareTile<P>::of_cta(p.rows, p.cols);
  ptx::grid_wait_dependencies();
  P x[SquareTile<P>::kRows];
  const u8* from = static_cast<const u8*>(p.x) + (tile.row * p.x_stride + tile.col) * P::kSize;
  load_rows(x, from, p.x_stride, tile.rows, tile.cols, p.vectors);
  if constexpr (C.form == QuantizeForm::blocks) quantize_block(x, tile, p.q, p.vectors, p.pow2_scales);
  if constexpr (C.form == QuantizeForm::both)
    quantize_pieces(x, p.q, tile.row, tile.col, tile.rows, tile.cols, p.vectors, p.pow2_scales);
  if constexpr (C.form == QuantizeForm::transposed || C.form == QuantizeForm::both) {
    __shared__ ColumnSmem<P> smem;
    quantize_columns(smem, x, tile, p.q_t, p.rows, p.cols, p.pow2_scales);
  }
}

}  // namespace phalanx
