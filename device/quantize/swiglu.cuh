// SwiGLU (device/quantize/swiglu.h) and quantisation of its result to E4M3, with a scale per 1 x 128:
//
//   q = e4m3(h / scale),  h = silu(gate) * up * weight
//
// Warps take 4 rows x 256 columns of h (FP32: 128) as in quantize_rows.cuh. A lane loads 16 bytes of gate and 16 of up
// of each row.
#pragma once
#include "device/quantize/quantize_rows.cuh"
#include "device/quantize/swiglu_pieces.cuh"

namespace phalanx {

template <SwigluConfig C, int kRows>
__device__ __forceinline__ void swiglu_quantize_rows(const SwigluParams& p) {
  using P = Piece<C.type>;
  const RowTile<C.type, kRows> tile(p.rows, p.cols);
  if (tile.rows <= 0) return;
  ptx::grid_wait_dependencies();

  P gate[kRows], up[kRows];
  load_swiglu(gate, up, p, tile);
  Piece<FloatType::f32, P::kCount> h[kRows];
  swiglu_pieces(h, gate, up, p.limit);
  weight_pieces(h, p, tile);
  quantize_pieces(h, p.q, tile.row, tile.col, tile.rows, tile.cols, p.vectors, p.pow2_scales);
}

template <SwigluConfig C>
__device__ __forceinline__ void swiglu_quantize(const SwigluParams& p) {
  ptx::grid_launch_dependents();
  if (p.rows_per_warp == 1)
    swiglu_quantize_rows<C, 1>(p);
  else
    swiglu_quantize_rows<C, RowTiles::kMany>(p);
}

}  // namespace phalanx
