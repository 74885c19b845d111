// What promotion costs, and what the phase of the warpgroups does to it: as mma_rate.cuh, operands resident, but each
// k-block starts from zero and is then added, scaled, to FP32 registers, as in the GEMM.
//
//     free       whatever the hardware makes of it            lock-step  all warpgroups meet before every product
//     ordered    a warpgroup issues its product when the one before it has issued its own: a ring of named barriers
//     skewed     free, but warpgroup i begins i * skew cycles late
//     bare       no promotion: the products alone
#pragma once
#include "device/ptx/memory.cuh"
#include "device/ptx/sync.cuh"
#include "device/ptx/wgmma.cuh"

namespace phalanx::probe {

enum class Phase { free, lockstep, ordered, bare };

constexpr int kPromotionStages = 4;

// A tile of kWarpgroups * kWaves * 64 rows and kN columns; 128 bytes of each row are a k-block.
template <int kN, int kWarpgroups, int kWaves>
constexpr int kPromotionStageBytes = (kWarpgroups * kWaves * 64 + kN) * 128;

// One CTA does num_iterations * kPromotionStages k-blocks of its tile. `operands` as for mma_rate; `scales`
// [kPromotionStages] floats; `keep` is 0, and an argument so that ptxas does not know.
template <int kN, int kWarpgroups, int kWaves, Phase kPhase>
__device__ __forceinline__ void promotion(const u32* operands, const float* scales, int num_iterations, int skew,
                                          float* sink, int keep) {
  constexpr int kStageBytes = kPromotionStageBytes<kN, kWarpgroups, kWaves>, kThreads = kWarpgroups * 128;
  extern __shared__ __align__(1024) u8 smem[];
  for (int i = threadIdx.x; i < kPromotionStages * kStageBytes / 4; i += kThreads)
    reinterpret_cast<u32*>(smem)[i] = operands[i];
  ptx::fence_proxy_async();
  __syncthreads();

  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  float acc[kWaves][kN / 2];
#pragma unroll
  for (int wave = 0; wave < kWaves; ++wave)
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) acc[wave][i] = 0;

  // Barrier 1 + w lets warpgroup w issue: it waits there, and its predecessor in the ring arrives after its own
  // product.
  const int mine = 1 + warpgroup, next = 1 + (warpgroup + 1) % kWarpgroups;
  if (kPhase == Phase::ordered && warpgroup == kWarpgroups - 1) ptx::named_barrier_arrive(next, 256);
  for (const long long start = clock64(); clock64() - start < i64(warpgroup) * skew;) {
  }

#pragma unroll 1
  for (int iteration = 0; iteration < num_iterations; ++iteration) {
#pragma unroll
    for (int stage = 0; stage < kPromotionStages; ++stage) {
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
        const u8* base = smem + stage * kStageBytes;
        const u64 a = ptx::wgmma_descriptor(base + (warpgroup * kWaves + wave) * 64 * 128);
        const u64 b = ptx::wgmma_descriptor(base + kWarpgroups * kWaves * 64 * 128);
        if constexpr (kPhase == Phase::bare) {
          ptx::WgmmaE4m3<kN>::multiply(acc[wave], a, b, keep);
          continue;
        }
        float partial[kN / 2];
        if constexpr (kPhase == Phase::lockstep) ptx::named_barrier_sync(1, kThreads);
        if constexpr (kPhase == Phase::ordered) ptx::named_barrier_sync(mine, 256);
        ptx::WgmmaE4m3<kN>::multiply(partial, a, b, false);
        if constexpr (kPhase == Phase::ordered) {
          const bool last = iteration == num_iterations - 1 && stage == kPromotionStages - 1 && wave == kWaves - 1;
          if (!(last && warpgroup == kWarpgroups - 1)) ptx::named_barrier_arrive(next, 256);
        }
        const float scale_lo = scales[stage] * 0.5f, scale_hi = scales[stage];
        ptx::wgmma_wait<0>();
        ptx::WgmmaE4m3<kN>::pin(partial);
#pragma unroll
        for (int i = 0; i < kN / 2; i += 4) {
          acc[wave][i + 0] += scale_lo * partial[i + 0];
          acc[wave][i + 1] += scale_lo * partial[i + 1];
          acc[wave][i + 2] += scale_hi * partial[i + 2];
          acc[wave][i + 3] += scale_hi * partial[i + 3];
        }
      }
    }
    if constexpr (kPhase == Phase::bare) {
      ptx::wgmma_wait<0>();
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) ptx::WgmmaE4m3<kN>::pin(acc[wave]);
    }
  }

  float sum = 0;
#pragma unroll
  for (int wave = 0; wave < kWaves; ++wave)
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sum += acc[wave][i];
  // Practically never; the compiler must believe that the sums are wanted.
  if (__float_as_uint(sum) == 0x9e3779b9u || keep) sink[threadIdx.x] = sum;
}

}  // namespace phalanx::probe
