// Quantisation to E4M3 and back.
//
//   per block:    scale = max(amax / 448, 2^-126), amax over its finite elements; rounded up to a power of two on request
//   per element:  q = e4m3(x * (1 / scale)),  x' = q * scale
//
// All in FP32 with IEEE rounding, as in src/cpu/quantize.cpp: the two give the same bytes. Bound by memory: a thread moves
// 16 bytes of x at a time where the alignment allows it.
#pragma once
#include "device/ptx/convert.cuh"
#include "device/ptx/sync.cuh"
#include "device/quantize/config.h"
#include "device/quantize/params.h"

namespace phalanx {

// One thread's share of a row: kCount neighbouring elements, 16 bytes of x.
template <QuantizeConfig C>
struct Vector {
  static constexpr int kCount = C.type == FloatType::f32 ? 4 : 8;
  static constexpr int kPerBlockRow = kQuantizeBlock / kCount;  // threads that share 128 columns of a row
  float v[kCount];
};

struct alignas(16) Bytes16 {
  u32 word[4];
};

template <QuantizeConfig C>
__device__ __forceinline__ float load_element(const void* x, i64 i) {
  if constexpr (C.type == FloatType::f32) return static_cast<const float*>(x)[i];
  const u16 bits = static_cast<const u16*>(x)[i];
  return C.type == FloatType::bf16 ? ptx::bf16_to_float(bits) : ptx::f16_to_float(bits);
}

template <QuantizeConfig C>
__device__ __forceinline__ void store_element(void* x, i64 i, float v) {
  if constexpr (C.type == FloatType::f32)
    static_cast<float*>(x)[i] = v;
  else
    static_cast<u16*>(x)[i] = u16(C.type == FloatType::bf16 ? ptx::pack_bf16(v, 0) : ptx::pack_f16(v, 0));
}

// Whether every full vector of x and of q may be moved at once. Uniform over the grid.
template <QuantizeConfig C>
__device__ bool is_aligned(const QuantizeParams& p) {
  constexpr int kCount = Vector<C>::kCount;
  const u64 x = reinterpret_cast<u64>(p.x), q = reinterpret_cast<u64>(p.q);
  return x % 16 == 0 && p.x_stride % kCount == 0 && q % kCount == 0 && p.q_stride % kCount == 0;
}

// Elements outside the matrix read as zero.
template <QuantizeConfig C>
__device__ __forceinline__ Vector<C> load_vector(const QuantizeParams& p, i64 row, int col, bool aligned) {
  constexpr int kCount = Vector<C>::kCount;
  Vector<C> r = {};
  if (row >= p.rows) return r;
  if (aligned && col + kCount <= p.cols) {
    constexpr int kSize = C.type == FloatType::f32 ? 4 : 2;
    const Bytes16 raw =
        *reinterpret_cast<const Bytes16*>(static_cast<const u8*>(p.x) + (row * p.x_stride + col) * kSize);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (C.type == FloatType::f32)
        r.v[i] = __uint_as_float(raw.word[i]);
      else
        r.v[i] = C.type == FloatType::bf16 ? ptx::bf16_to_float(u16(raw.word[i / 2] >> (i % 2 * 16)))
                                           : ptx::f16_to_float(u16(raw.word[i / 2] >> (i % 2 * 16)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (col + i < p.cols) r.v[i] = load_element<C>(p.x, row * p.x_stride + col + i);
  }
  return r;
}

template <QuantizeConfig C>
__device__ __forceinline__ void quantize_vector(const QuantizeParams& p, i64 row, int col, bool aligned, float inverse,
                                                const Vector<C>& x) {
  constexpr int kCount = Vector<C>::kCount;
  if (row >= p.rows) return;
  u32 word[kCount / 4];
#pragma unroll
  for (int i = 0; i < kCount; i += 4)
    word[i / 4] = ptx::pack_e4m3(x.v[i] * inverse, x.v[i + 1] * inverse) |
                  u32(ptx::pack_e4m3(x.v[i + 2] * inverse, x.v[i + 3] * inverse)) << 16;
  u8* q = p.q + row * p.q_stride + col;
  if (aligned && col + kCount <= p.cols) {
    if constexpr (kCount == 4)
      *reinterpret_cast<u32*>(q) = word[0];
    else
      *reinterpret_cast<uint2*>(q) = make_uint2(word[0], word[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (col + i < p.cols) q[i] = u8(word[i / 4] >> (i % 4 * 8));
  }
}

// Over finite elements: a comparison with NaN is false, and infinity is not below infinity.
template <QuantizeConfig C>
__device__ __forceinline__ float finite_amax(float amax, const Vector<C>& x) {
#pragma unroll
  for (const float v : x.v) amax = fabsf(v) < __uint_as_float(0x7f800000u) ? fmaxf(amax, fabsf(v)) : amax;
  return amax;
}

template <int kLanes>
__device__ __forceinline__ float max_over_lanes(float x) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, distance));
  return x;
}

__device__ __forceinline__ float scale_of(float amax, bool pow2) {
  const float scale = fmaxf(__fdiv_rn(amax, kE4m3Max), kMinScale);
  return pow2 ? __uint_as_float(pow2_ceil_bits(__float_as_uint(scale))) : scale;
}

// --- 1 x 128: neighbouring lanes share a block ----------------------------------------------------------------------

template <QuantizeConfig C>
__device__ void quantize_rows(const QuantizeParams& p) {
  using V = Vector<C>;
  constexpr int kBlocksPerCta = kQuantizeThreads / V::kPerBlockRow;
  const bool aligned = is_aligned<C>(p);
  const int blocks_per_row = ceil_div(p.cols, kQuantizeBlock), lane = threadIdx.x % V::kPerBlockRow;
  const i64 num_blocks = i64(p.rows) * blocks_per_row;
  // The bound is that of the warp's first block: all lanes take part in the shuffles.
  for (i64 first = i64(blockIdx.x) * kBlocksPerCta; first < num_blocks; first += i64(gridDim.x) * kBlocksPerCta) {
    const i64 block = first + threadIdx.x / V::kPerBlockRow;
    const i64 row = block / blocks_per_row;  // past the end: p.rows or more
    const int block_col = int(block - row * blocks_per_row), col = block_col * kQuantizeBlock + lane * V::kCount;
    const V x = load_vector<C>(p, row, col, aligned);
    const float scale = scale_of(max_over_lanes<V::kPerBlockRow>(finite_amax<C>(0, x)), p.pow2_scales);
    quantize_vector<C>(p, row, col, aligned, __frcp_rn(scale), x);
    if (lane == 0 && row < p.rows) p.scales[row * p.scale_stride_row + block_col * p.scale_stride_col] = scale;
  }
}

// --- 128 x 128: a CTA holds a block in registers ----------------------------------------------------------------------

template <QuantizeConfig C>
__device__ void quantize_blocks(const QuantizeParams& p) {
  using V = Vector<C>;
  constexpr int kRowsPerPass = kQuantizeThreads / V::kPerBlockRow, kPasses = kQuantizeBlock / kRowsPerPass;
  __shared__ float warp_amax[kQuantizeThreads / 32];
  const bool aligned = is_aligned<C>(p);
  const int blocks_per_row = ceil_div(p.cols, kQuantizeBlock);
  const i64 num_blocks = i64(ceil_div(p.rows, kQuantizeBlock)) * blocks_per_row;
  for (i64 block = blockIdx.x; block < num_blocks; block += gridDim.x) {
    const i64 block_row = block / blocks_per_row;
    const int block_col = int(block - block_row * blocks_per_row);
    const i64 row = block_row * kQuantizeBlock + threadIdx.x / V::kPerBlockRow;
    const int col = block_col * kQuantizeBlock + threadIdx.x % V::kPerBlockRow * V::kCount;

    V x[kPasses];
    float amax = 0;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) x[i] = load_vector<C>(p, row + i * kRowsPerPass, col, aligned);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) amax = finite_amax<C>(amax, x[i]);
    amax = max_over_lanes<32>(amax);
    if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = amax;
    __syncthreads();
#pragma unroll
    for (const float other : warp_amax) amax = fmaxf(amax, other);
    __syncthreads();  // warp_amax may be written again

    const float scale = scale_of(amax, p.pow2_scales), inverse = __frcp_rn(scale);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) quantize_vector<C>(p, row + i * kRowsPerPass, col, aligned, inverse, x[i]);
    if (threadIdx.x == 0) p.scales[block_row * p.scale_stride_row + block_col * p.scale_stride_col] = scale;
  }
}

// --- kernels ------------------------------------------------------------------------------------------------------------

template <QuantizeConfig C>
__device__ __forceinline__ void quantize(const QuantizeParams& p) {
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();
  if constexpr (C.shape == ScaleShape::row_1x128)
    quantize_rows<C>(p);
  else
    quantize_blocks<C>(p);
}

// One thread a pair of elements, one CTA a piece of a row.
template <QuantizeConfig C>
__device__ __forceinline__ void dequantize(const QuantizeParams& p) {
  ptx::grid_launch_dependents();
  ptx::grid_wait_dependencies();
  const int pairs_per_row = ceil_div(p.cols, 2);
  const i64 num_pairs = i64(p.rows) * pairs_per_row, step = i64(gridDim.x) * kQuantizeThreads;
  for (i64 i = i64(blockIdx.x) * kQuantizeThreads + threadIdx.x; i < num_pairs; i += step) {
    const i64 row = i / pairs_per_row, scale_row = C.shape == ScaleShape::row_1x128 ? row : row / kQuantizeBlock;
    const int col = int(i - row * pairs_per_row) * 2;
    const bool has_second = col + 1 < p.cols;
    const u8* q = p.q + row * p.q_stride + col;
    const float scale = p.scales[scale_row * p.scale_stride_row + col / kQuantizeBlock * p.scale_stride_col];
    const float2 v = ptx::e4m3_pair_to_float(u16(q[0] | (has_second ? q[1] << 8 : 0)));
    store_element<C>(p.x, row * p.x_stride + col, v.x * scale);
    if (has_second) store_element<C>(p.x, row * p.x_stride + col + 1, v.y * scale);
  }
}

}  // namespace phalanx
