// The gradients of SwiGLU (device/quantize/swiglu.h): of gate and up, and of the rows' weights.
//
//   grad_gate = (dh * up) * silu'(gate),  grad_up = dh * silu(gate)      dh = grad * weight
//   grad_weight = sum over the row of grad * silu(gate) * up
//
//   CTA:    4 whole rows (where there are few, one); in each step, 256 threads take 16 bytes of gate, up and grad of
//           each row
//   sums:   thread, step after step ──> lanes of a warp, as a tree ──> shared: warp_sums
//           ──> thread r: the warps of row r in order. So their order depends on the shape alone.
#pragma once
#include "device/ptx/sync.cuh"
#include "device/quantize/params.h"
#include "device/quantize/swiglu_pieces.cuh"

namespace phalanx {

// By all threads of the CTA. `rows`: as many exist.
template <int kRows, int kThreads>
__device__ __forceinline__ void store_row_sums(float (&sum)[kRows], float* out, i64 stride, i64 rows) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float warp_sums[kWarps][kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], distance);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][r] = sum[r];
  }
  __syncthreads();  // warp_sums are complete
  const int r = int(threadIdx.x);
  if (r >= kRows || r >= rows) return;
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += warp_sums[warp][r];
  out[r * stride] = total;
}

template <SwigluBackwardConfig C, int kRows>
__device__ __forceinline__ void swiglu_backward_rows(const SwigluBackwardParams& p) {
  using P = Piece<C.type>;
  const i64 row = i64(blockIdx.x) * kRows, rows = p.rows - row;
  ptx::grid_wait_dependencies();
  float weight[kRows], sum[kRows] = {};
  load_weights(weight, p.weights, p.weight_stride, row, rows);

  for (int col = int(threadIdx.x) * P::kCount; col < p.cols; col += C.num_threads() * P::kCount) {
    const i64 gate_col = swiglu_gate_column(col, p.interleaved),
              up = swiglu_up_distance(p.cols, p.interleaved) * P::kSize;
    const u8* x = static_cast<const u8*>(p.x) + (row * p.x_stride + gate_col) * P::kSize;
    const u8* grad = static_cast<const u8*>(p.grad) + (row * p.grad_stride + col) * P::kSize;
    u8* grad_x = static_cast<u8*>(p.grad_x) + (row * p.grad_x_stride + gate_col) * P::kSize;
    P gates[kRows], ups[kRows], grads[kRows];
    load_rows(gates, x, p.x_stride, rows, p.cols - col, p.vectors);
    load_rows(ups, x + up, p.x_stride, rows, p.cols - col, p.vectors);
    load_rows(grads, grad, p.grad_stride, rows, p.cols - col, p.vectors);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sum[r] += backward_piece<true>(gates[r], ups[r], grads[r], p.limit, weight[r]);
    store_rows(grad_x, gates, p.grad_x_stride, rows, p.cols - col, p.vectors);
    store_rows(grad_x + up, ups, p.grad_x_stride, rows, p.cols - col, p.vectors);
  }
  if (p.grad_weights)
    store_row_sums<kRows, C.num_threads()>(sum, p.grad_weights + row * p.grad_weight_stride, p.grad_weight_stride,
                                           rows);
}

template <SwigluBackwardConfig C>
__device__ __forceinline__ void swiglu_backward(const SwigluBackwardParams& p) {
  ptx::grid_launch_dependents();
  if (p.rows_per_cta == 1)
    swiglu_backward_rows<C, 1>(p);
  else
    swiglu_backward_rows<C, WholeRows::kMany>(p);
}

}  // namespace phalanx
