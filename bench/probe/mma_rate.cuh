// The arithmetic ceiling: FP8 tensor-core products on operands that stay in shared memory. No TMA, no barriers, no
// promotion.
//
//     2 warpgroups, each its own A [64, 128]     one B [kN, 128] for both      kStages of both, random, walked in turn
//
// Two warpgroups because one leaves the tensor cores idle while it waits; several stages because a chip that multiplies
// the same bits over and over draws less power, and runs at a higher clock, than it would on real data.
#pragma once
#include "device/ptx/memory.cuh"
#include "device/ptx/wgmma.cuh"

namespace phalanx::probe {

constexpr int kMmaThreads = 256;
constexpr int kMmaStages = 4;
constexpr int kMmaK = 128;  // bytes of a row, four wgmma deep

template <int kN>
constexpr int kMmaStageBytes = (2 * 64 + kN) * kMmaK;

// One CTA does num_iterations * kMmaStages * 2 products of 64 x kN x 128.
//
// `operands` holds kMmaStages * kMmaStageBytes<kN> random E4M3 bytes without NaN. They are taken in the order in which
// they come: which element of a random matrix a byte is does not matter here. `keep` is 0: then every k-block starts
// from zero, as in a GEMM, and nothing is written. It is an argument because ptxas drops products that it can see to be
// overwritten unread; with 1 the sums go on and end in `sink` [kMmaThreads].
template <int kN>
__device__ __forceinline__ void mma_rate(const u32* operands, int num_iterations, float* sink, int keep) {
  constexpr int kStageBytes = kMmaStageBytes<kN>;
  extern __shared__ __align__(1024) u8 smem[];
  for (int i = threadIdx.x; i < kMmaStages * kStageBytes / 4; i += kMmaThreads)
    reinterpret_cast<u32*>(smem)[i] = operands[i];
  ptx::fence_proxy_async();
  __syncthreads();

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  float acc[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) acc[i] = 0;

#pragma unroll 1
  for (int iteration = 0; iteration < num_iterations; ++iteration) {
#pragma unroll
    for (int stage = 0; stage < kMmaStages; ++stage) {
      const u64 a = ptx::wgmma_descriptor(smem + stage * kStageBytes + warpgroup * 64 * kMmaK);
      const u64 b = ptx::wgmma_descriptor(smem + stage * kStageBytes + 2 * 64 * kMmaK);
      ptx::WgmmaE4m3<kN>::multiply(acc, a, b, keep);
    }
    ptx::wgmma_wait<0>();
    ptx::WgmmaE4m3<kN>::pin(acc);
  }

  float sum = 0;
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sum += acc[i];
  if (keep) sink[threadIdx.x] = sum;
}

}  // namespace phalanx::probe
