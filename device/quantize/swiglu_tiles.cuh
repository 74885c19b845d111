// SwiGLU, and its gradients, quantised both ways: by rows for the next product, transposed for the gradient of its
// weights. Each CTA computes tiles of 128 x 128 into registers and hands them to quantize_tiles.cuh:
//
//   swiglu_quantize_both   one tile of h = silu(gate) * up * weight, in FP32
//   swiglu_backward_both   one tile of x's gradient, rounded to x's type. Each thread computes the gradient of 8 gates
//                          or of their 8 ups from both and from the result's gradient. The tile with the others, which
//                          reads the same, runs at about the same time: once from memory, once from L2
#pragma once
#include "device/quantize/quantize_tiles.cuh"
#include "device/quantize/swiglu_pieces.cuh"

namespace phalanx {

template <SwigluTilesConfig C>
__device__ __forceinline__ void swiglu_quantize_both(const SwigluParams& p) {
  using P = Piece<C.type>;
  using H = Piece<FloatType::f32, P::kCount>;
  constexpr int kRows = SquareTile<H>::kRows;
  __shared__ ColumnSmem<H> smem;
  ptx::grid_launch_dependents();
  const auto tile = SquareTile<H>::of_cta(p.rows, p.cols);
  ptx::grid_wait_dependencies();

  H h[kRows] = {};
  if (tile.rows > 0) {  // where there are few, the others' would take most of the time
    P gate[kRows], up[kRows];
    load_swiglu(gate, up, p, tile);
    swiglu_pieces<kRows, true>(h, gate, up, p.limit);
    weight_pieces(h, p, tile);
  }
  quantize_pieces(h, p.q, tile.row, tile.col, tile.rows, tile.cols, p.vectors, p.pow2_scales);
  quantize_columns(smem, h, tile, p.q_t, p.rows, p.cols, p.pow2_scales);
}

// Which of gate and up a piece of x is, and of which columns of the result: the host has seen to it that it is not
// both.
struct GateOrUp {
  bool is_up;
  int col;

  __device__ __forceinline__ GateOrUp(int x_col, int cols, bool interleaved)
      : is_up(interleaved ? x_col / 8 % 2 : x_col >= cols),
        col(interleaved ? x_col / 16 * 8 + x_col % 8 : x_col - (is_up ? cols : 0)) {}
};

template <SwigluTilesConfig C>
__device__ __forceinline__ void swiglu_backward_both(const SwigluBackwardBothParams& p) {
  using P = Piece<C.type>;
  constexpr int kRows = SquareTile<P>::kRows, kAtOnce = 2;
  __shared__ ColumnSmem<P> smem;
  ptx::grid_launch_dependents();
  const auto tile = SquareTile<P>::of_cta(p.rows, 2 * p.cols);
  const GateOrUp mine(tile.col, p.cols, p.interleaved);
  const int cols = tile.cols > 0 ? p.cols - mine.col : 0;
  ptx::grid_wait_dependencies();

  const i64 gate_col = swiglu_gate_column(mine.col, p.interleaved), up = swiglu_up_distance(p.cols, p.interleaved);
  const u8* x = static_cast<const u8*>(p.x) + (tile.row * p.x_stride + gate_col) * P::kSize;
  const u8* grad = static_cast<const u8*>(p.grad) + (tile.row * p.grad_stride + mine.col) * P::kSize;
  P gradient[kRows] = {};
#pragma unroll
  for (int r0 = 0; r0 < kRows; r0 += kAtOnce) {
    const i64 rows = tile.rows - r0;
    P gates[kAtOnce], ups[kAtOnce], grads[kAtOnce];
    load_rows(gates, x + r0 * p.x_stride * P::kSize, p.x_stride, rows, cols, p.vectors);
    load_rows(ups, x + (r0 * p.x_stride + up) * P::kSize, p.x_stride, rows, cols, p.vectors);
    load_rows(grads, grad + r0 * p.grad_stride * P::kSize, p.grad_stride, rows, cols, p.vectors);
    float weight[kAtOnce];
    load_weights(weight, p.weights, p.weight_stride, tile.row + r0, rows);
    if (rows <= 0) continue;
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      backward_piece(gates[r], ups[r], grads[r], p.limit, weight[r]);
#pragma unroll
      for (int i = 0; i < P::kWords; ++i) gradient[r0 + r].word[i] = mine.is_up ? ups[r].word[i] : gates[r].word[i];
    }
  }
  quantize_pieces(gradient, p.q, tile.row, tile.col, tile.rows, tile.cols, p.vectors, p.pow2_scales);
  quantize_columns(smem, gradient, tile, p.q_t, p.rows, 2 * p.cols, p.pow2_scales);
}

}  // namespace phalanx
