// Quantisation to E4M3 with a scale per 1 x 128. Bound by memory, so nothing but loads, and stores of whole sectors:
//
//   warp:   4 rows x 256 columns of BF16 (FP32: 128); all its loads are in flight before the first is used
//             row 0   [ lanes 0 - 15: a block | lanes 16 - 31: a block ]
//             ...       16 bytes of x a lane, 8 bytes of q
//             row 3   [                       |                        ]
//           scales of MN-major order: 16 bytes side by side for each of the two columns
//   CTA:    4 such warps, side by side, then down
//
// Few rows are spread over more warps, one row each.
#pragma once
#include "device/ptx/sync.cuh"
#include "device/quantize/encode.cuh"

namespace phalanx {

// A thread's place in a matrix of which each warp takes kRows rows.
template <FloatType T, int kRows>
struct RowTile {
  i64 row;   // the warp's first
  int col;   // of this thread's pieces
  i64 rows;  // from `row` to the end
  int cols;  // from `col` to the end

  __device__ __forceinline__ RowTile(int num_rows, int num_cols) {
    const u32 warp = blockIdx.x * (RowTiles::kThreads / 32) + threadIdx.x / 32;
    const u32 across = ceil_div<u32>(num_cols, RowTiles::warp_cols(T)), band = warp / across;
    row = i64(band) * kRows;
    col = int(warp - band * across) * RowTiles::warp_cols(T) + int(threadIdx.x % 32) * piece_count(T);
    rows = num_rows - row;
    cols = num_cols - col;
  }
};

template <QuantizeConfig C, int kRows>
__device__ __forceinline__ void quantize_rows(const QuantizeParams& p) {
  using P = Piece<C.type>;
  const RowTile<C.type, kRows> tile(p.rows, p.cols);
  if (tile.rows <= 0) return;
  ptx::grid_wait_dependencies();
  P x[kRows];
  const u8* from = static_cast<const u8*>(p.x) + (tile.row * p.x_stride + tile.col) * P::kSize;
  load_rows(x, from, p.x_stride, tile.rows, tile.cols, p.vectors);
  quantize_pieces(x, p.q, tile.row, tile.col, tile.rows, tile.cols, p.vectors, p.pow2_scales);
}

}  // namespace phalanx
