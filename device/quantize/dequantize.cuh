// From E4M3 back to floats: x = q * scale, rounded once to x's type. A warp takes 4 rows x 256 columns (FP32: 128) as
// in quantize_rows.cuh; a lane reads 8 bytes of each row (FP32: 4) and writes 16.
#pragma once
#include "device/quantize/quantize_rows.cuh"

namespace phalanx {

template <DequantizeConfig C, int kRows>
__device__ __forceinline__ void dequantize_rows(const DequantizeParams& p) {
  using P = Piece<C.type>;
  const RowTile<C.type, kRows> tile(p.rows, p.cols);
  if (tile.rows <= 0 || tile.cols <= 0) return;
  ptx::grid_wait_dependencies();

  const u8* from = p.q.data + tile.row * p.q.stride + tile.col;
  u32 codes[kRows][P::kCount / 4];
  load_rows<1>(codes, from, p.q.stride, tile.rows, tile.cols, p.vectors);
  float scale[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= tile.rows) continue;
    const i64 scale_row = C.shape == ScaleShape::row_1x128 ? tile.row + r : (tile.row + r) / kQuantizeBlock;
    scale[r] = p.q.scales[scale_row * p.q.scale_stride_row + tile.col / kQuantizeBlock * p.q.scale_stride_col];
  }
  P x[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < P::kCount; i += 2) {
      const float2 v = ptx::e4m3_pair_to_float(u16(codes[r][i / 4] >> (i % 4 * 8)));
      x[r].set_pair(i, v.x * scale[r], v.y * scale[r]);
    }
  }
  u8* to = static_cast<u8*>(p.x) + (tile.row * p.x_stride + tile.col) * P::kSize;
  store_rows(to, x, p.x_stride, tile.rows, tile.cols, p.vectors);
}

template <DequantizeConfig C>
__device__ __forceinline__ void dequantize(const DequantizeParams& p) {
  ptx::grid_launch_dependents();
  if (p.rows_per_warp == 1)
    dequantize_rows<C, 1>(p);
  else
    dequantize_rows<C, RowTiles::kMany>(p);
}

}  // namespace phalanx
