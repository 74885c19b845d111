// Rows of experts back to their tokens, and the way back of that.
//
//   out[t] = sum over k of weights[t, k] * rows[slots[t, k]]  (+ residual[t])
//
//       FP32, in the order of k, each product and each sum rounded once; choices without a row add nothing. A CTA takes 2 KB
//       of every row of a token, eight rows in flight.
//
//   grad_rows[slots[t, k]] = weights[t, k] * grad_out[t];  padding rows become zeros
//   grad_weights[t, k]     = dot(grad_out[t], rows[slots[t, k]])
//
//       The first CTAs take a token each, the last clear padding rows. Each thread sums its columns in FP32, then the lanes, then
//       the warps, in a fixed order.
//
// Bound by memory.
#pragma once
#include "device/moe/config.h"
#include "device/moe/params.h"
#include "device/moe/permute.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/sync.cuh"

namespace phalanx {

constexpr int kRowsInFlight = 8;

// kCount columns of a row, as a thread holds them.
template <bool kF32, int kCount>
struct Columns {
  static constexpr int kBytes = kCount * (kF32 ? 4 : 2);
  u32 word[kBytes / 4];

  __device__ __forceinline__ void load(const u8* p) {
#pragma unroll
    for (int i = 0; i < kBytes / 8; ++i) {
      if constexpr (kBytes % 16 == 0) {
        if (i % 2 == 0) {
          const uint4 v = reinterpret_cast<const uint4*>(p)[i / 2];
          word[2 * i] = v.x, word[2 * i + 1] = v.y, word[2 * i + 2] = v.z, word[2 * i + 3] = v.w;
        }
      } else {
        const uint2 v = reinterpret_cast<const uint2*>(p)[i];
        word[2 * i] = v.x, word[2 * i + 1] = v.y;
      }
    }
  }
  __device__ __forceinline__ void store(u8* p) const {
#pragma unroll
    for (int i = 0; i < kBytes / 8; ++i) {
      if constexpr (kBytes % 16 == 0) {
        if (i % 2 == 0)
          reinterpret_cast<uint4*>(p)[i / 2] =
              make_uint4(word[2 * i], word[2 * i + 1], word[2 * i + 2], word[2 * i + 3]);
      } else {
        reinterpret_cast<uint2*>(p)[i] = make_uint2(word[2 * i], word[2 * i + 1]);
      }
    }
  }
  __device__ __forceinline__ float get(int i) const {
    if constexpr (kF32) return __uint_as_float(word[i]);
    return i % 2 == 0 ? ptx::bf16_lo(word[i / 2]) : ptx::bf16_hi(word[i / 2]);
  }
  // Rounds to nearest even.
  __device__ __forceinline__ void set(const float (&v)[kCount]) {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {
      if constexpr (kF32)
        word[i] = __float_as_uint(v[i]);
      else
        word[i] = ptx::pack_bf16(v[2 * i], v[2 * i + 1]);
    }
  }
};

// 16 bytes of a row of an expert; as many columns of a token.
template <UnpermuteConfig C>
constexpr int kVectorColumns = C.rows_f32 ? 4 : 8;
template <UnpermuteConfig C>
using RowVector = Columns<C.rows_f32, kVectorColumns<C>>;
template <UnpermuteConfig C>
using TokenVector = Columns<C.tokens_f32, kVectorColumns<C>>;

// --- kernels ---------------------------------------------------------------------------------------------------------

// A thread takes one vector of every row of a token.
template <UnpermuteConfig C>
__device__ __forceinline__ void unpermute(const UnpermuteParams& p) {
  constexpr int kCount = kVectorColumns<C>;
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();
  const int token = p.pieces.of(int(blockIdx.x));
  const int vector = p.pieces.rest(int(blockIdx.x)) * kUnpermuteThreads + int(threadIdx.x);
  if (vector >= p.row_vectors) return;
  const int* slots = p.slots + i64(token) * p.topk;
  const float* weights = p.weights + token * p.weights_stride;
  const u8* rows = p.rows + i64(vector) * 16;

  TokenVector<C> token_vector = {};
  if (p.residual) token_vector.load(p.residual + token * p.residual_stride + i64(vector) * TokenVector<C>::kBytes);
  float sum[kCount] = {};
  for (int k = 0; k < p.topk; k += kRowsInFlight) {
    int slot[kRowsInFlight];
    float weight[kRowsInFlight];
    RowVector<C> row[kRowsInFlight];
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      slot[i] = k + i < p.topk ? slots[k + i] : -1;
      weight[i] = p.weights && k + i < p.topk ? weights[k + i] : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      row[i] = {};
      if (slot[i] >= 0) row[i].load(rows + slot[i] * p.rows_stride);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (slot[i] < 0) weight[i] = 0;  // adds nothing: no sum is -0
#pragma unroll
      for (int c = 0; c < kCount; ++c) sum[c] = __fadd_rn(sum[c], __fmul_rn(weight[i], row[i].get(c)));
    }
  }
  if (p.residual) {
#pragma unroll
    for (int c = 0; c < kCount; ++c) sum[c] = __fadd_rn(sum[c], token_vector.get(c));
  }
  token_vector.set(sum);
  token_vector.store(p.out + token * p.out_stride + i64(vector) * TokenVector<C>::kBytes);
}

// The token's choices k .. k + kRowsInFlight - 1. `dot` is this thread's part of their grad_weights.
template <UnpermuteConfig C>
__device__ __forceinline__ void backward_rows(const UnpermuteBackwardParams& p, int token, int k,
                                              float (&dot)[kRowsInFlight]) {
  constexpr int kCount = kVectorColumns<C>;
  int slot[kRowsInFlight];
  float weight[kRowsInFlight];
#pragma unroll
  for (int i = 0; i < kRowsInFlight; ++i) {
    slot[i] = k + i < p.topk ? p.slots[i64(token) * p.topk + k + i] : -1;
    weight[i] = p.weights && k + i < p.topk ? p.weights[token * p.weights_stride + k + i] : 1.0f;
    dot[i] = 0;
  }
  for (int vector = threadIdx.x; vector < p.grad_rows.row_vectors; vector += kBackwardThreads) {
    TokenVector<C> grad;
    grad.load(p.grad_out + token * p.grad_out_stride + i64(vector) * TokenVector<C>::kBytes);
    RowVector<C> row[kRowsInFlight];
    if (p.grad_weights) {
#pragma unroll
      for (int i = 0; i < kRowsInFlight; ++i)
        if (slot[i] >= 0) row[i].load(p.rows + slot[i] * p.rows_stride + vector * 16);
    }
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
      if (slot[i] < 0) continue;
      float scaled[kCount];
#pragma unroll
      for (int c = 0; c < kCount; ++c) scaled[c] = weight[i] * grad.get(c);
      RowVector<C> out;
      out.set(scaled);
      out.store(p.grad_rows.data + slot[i] * p.grad_rows.stride + vector * 16);
      if (p.grad_weights) {
#pragma unroll
        for (int c = 0; c < kCount; ++c) dot[i] = fmaf(grad.get(c), row[i].get(c), dot[i]);
      }
    }
  }
}

template <UnpermuteConfig C>
__device__ __forceinline__ void unpermute_backward(const UnpermuteBackwardParams& p) {
  constexpr int kWarps = kBackwardThreads / 32;
  __shared__ float partial[kWarps][kRowsInFlight];
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();
  const int token = blockIdx.x;
  if (token >= p.grad_rows.first_cta)
    return RowTask(p.grad_rows, token - p.grad_rows.first_cta).clear_padding(p.grad_rows);
  for (int k = 0; k < p.topk; k += kRowsInFlight) {
    float dot[kRowsInFlight];
    backward_rows<C>(p, token, k, dot);
    if (!p.grad_weights) continue;
#pragma unroll
    for (int i = 0; i < kRowsInFlight; ++i) {
#pragma unroll
      for (int d = 16; d > 0; d /= 2) dot[i] += __shfl_xor_sync(~0u, dot[i], d);
      if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][i] = dot[i];
    }
    __syncthreads();
    if (const int i = threadIdx.x; i < kRowsInFlight && k + i < p.topk) {
      float sum = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp][i];
      p.grad_weights[i64(token) * p.topk + k + i] = sum;
    }
    __syncthreads();  // `partial` may be written again
  }
}

}  // namespace phalanx
