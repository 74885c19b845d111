// SwiGLU, and its gradients, quantised both ways: by rows for the next product, transposed for the gradient of its
// weights. Each CTA computes tiles of 128 x 128 into registers and hands them to quantize_tiles.cuh:
//
//   swiglu_quantize_both   one tile of h = silu(gate) * up * weight, in FP32
//   swiglu_backward_both   one tile of x's gradient, rounded to x's type. Each thread computes the gradient of 8 gates
//                          or of their 8 ups from both and from the result's gradient. The tile with the others, which
//                          reads the same, runs at about the same time: once from memory, once from L2
//                          In pairs: two tiles of it, of which each gradient is computed once. For many rows, where
//                          arithmetic is what takes time, and if gates and ups do not meet in a block
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
    swiglu_pieces(h, gate, up, p.limit);
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

// Where gates and ups take turns, an even lane computes a gate and an up of the first tile, an odd one of the second;
// then a lane has a piece of both tiles.
template <class P>
__device__ __forceinline__ void exchange_with_neighbour(P& first, P& second) {
  const bool odd = threadIdx.x % 2;
#pragma unroll
  for (int i = 0; i < P::kWords; ++i) {
    const u32 a = first.word[i], b = second.word[i], given = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
    first.word[i] = odd ? given : a, second.word[i] = odd ? b : given;
  }
}

// Its vectors are aligned. Both tiles wait in shared memory until they are quantised, one after the other.
template <SwigluTilesConfig C>
__device__ __forceinline__ void swiglu_backward_pairs(const SwigluBackwardBothParams& p) {
  using P = Piece<C.type>;
  constexpr int kRows = SquareTile<P>::kRows, kAtOnce = 2;
  extern __shared__ __align__(128) u8 smem_base[];
  uint4* mine = reinterpret_cast<uint4*>(smem_base) + threadIdx.x;  // and every num_threads() behind it
  __shared__ ColumnSmem<P> smem;
  ptx::grid_launch_dependents();
  const u32 pairs = ceil_div(p.cols, kQuantizeBlock), band = blockIdx.x / pairs;
  const int pair = int(blockIdx.x - band * pairs), lane = int(threadIdx.x) % P::kLanes;
  const int in_pair = p.interleaved ? lane % 2 * (P::kLanes / 2) + lane / 2 : lane;  // which piece of the result
  const int col = pair * kQuantizeBlock + in_pair * P::kCount, cols = p.cols - col;
  ptx::grid_wait_dependencies();

  const i64 row = SquareTile<P>(band, 0, p.rows, 2 * p.cols).row, up = swiglu_up_distance(p.cols, p.interleaved);
  const u8* x = static_cast<const u8*>(p.x) + (row * p.x_stride + swiglu_gate_column(col, p.interleaved)) * P::kSize;
  const u8* grad = static_cast<const u8*>(p.grad) + (row * p.grad_stride + col) * P::kSize;
#pragma unroll 1  // registers hold no more
  for (int r0 = 0; r0 < kRows; r0 += kAtOnce) {
    const i64 rows = p.rows - row - r0;
    P gates[kAtOnce], ups[kAtOnce], grads[kAtOnce];
    load_rows(gates, x + r0 * p.x_stride * P::kSize, p.x_stride, rows, cols, true);
    load_rows(ups, x + (r0 * p.x_stride + up) * P::kSize, p.x_stride, rows, cols, true);
    load_rows(grads, grad + r0 * p.grad_stride * P::kSize, p.grad_stride, rows, cols, true);
    float weight[kAtOnce];
    load_weights(weight, p.weights, p.weight_stride, row + r0, rows);
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      if (has_limit(p.limit))
        backward_piece<true>(gates[r], ups[r], grads[r], p.limit, weight[r]);
      else
        backward_piece<false>(gates[r], ups[r], grads[r], p.limit, weight[r]);
      if (p.interleaved) exchange_with_neighbour(gates[r], ups[r]);
      store_vector<P::kBytes>(mine + (r0 + r) * C.num_threads(), gates[r].word);
      store_vector<P::kBytes>(mine + (kRows + r0 + r) * C.num_threads(), ups[r].word);
    }
  }
#pragma unroll 1
  for (int second = 0; second < 2; ++second) {
    const SquareTile<P> to(band, p.interleaved ? 2 * pair + second : second * int(pairs) + pair, p.rows, 2 * p.cols);
    P gradient[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      load_vector<P::kBytes>(gradient[r].word, mine + (second * kRows + r) * C.num_threads());
    quantize_pieces(gradient, p.q, to.row, to.col, to.rows, to.cols, true, p.pow2_scales);
    quantize_columns(smem, gradient, to, p.q_t, p.rows, 2 * p.cols, p.pow2_scales);
  }
}

template <SwigluTilesConfig C>
__device__ __forceinline__ void swiglu_backward_both(const SwigluBackwardBothParams& p) {
  if constexpr (C.pairs) return swiglu_backward_pairs<C>(p);
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
      backward_piece<true>(gates[r], ups[r], grads[r], p.limit, weight[r]);
#pragma unroll
      for (int i = 0; i < P::kWords; ++i) gradient[r0 + r].word[i] = mine.is_up ? ups[r].word[i] : gates[r].word[i];
    }
  }
  quantize_pieces(gradient, p.q, tile.row, tile.col, tile.rows, tile.cols, p.vectors, p.pow2_scales);
  quantize_columns(smem, gradient, tile, p.q_t, p.rows, 2 * p.cols, p.pow2_scales);
}

}  // namespace phalanx
