// The ceiling of decoding: a kernel that brings a weight matrix through shared memory once, and does nothing with it.
//
//     one thread a CTA:   chunk 0 .. kStages - 1 requested -> wait for chunk i, request chunk i + kStages in its place
//
// A chunk is 16 KB: so many bytes of plain memory, or, as a GEMM reads a row-major matrix, a box of 128 rows x 128.
#pragma once
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/sync.cuh"
#include "device/ptx/tma.cuh"

namespace phalanx::probe {

constexpr int kChunkBytes = 16384, kChunkRows = 128;

struct WeightStream {
  const u8* data;
  int num_chunks;
  int num_k_blocks;  // of a row: boxes are walked along K first
  int wait_first;    // for the previous kernel, before the first request; else after the last
  int interleaved;   // CTA i takes chunks i, i + number of CTAs, ...; else the i-th run of chunks
};

template <int kStages, bool kBoxes>
__device__ __forceinline__ void weight_stream(const TensorMap& map, const WeightStream& p) {
  extern __shared__ __align__(1024) u8 smem[];
  u64* full = reinterpret_cast<u64*>(smem + kStages * kChunkBytes);  // published by TMA, waited for by the one thread
  ptx::grid_launch_dependents();
  if (threadIdx.x != 0) return;
  for (int s = 0; s < kStages; ++s) ptx::mbarrier_init(&full[s], 1);
  ptx::fence_mbarrier_init();
  if (p.wait_first) ptx::grid_wait_dependencies();

  const int cta = blockIdx.x, num_ctas = gridDim.x;
  const int first = p.interleaved ? cta : int(i64(p.num_chunks) * cta / num_ctas);
  const int step = p.interleaved ? num_ctas : 1;
  const int count =
      p.interleaved ? ceil_div(p.num_chunks - cta, num_ctas) : int(i64(p.num_chunks) * (cta + 1) / num_ctas) - first;
  int stage = 0;
  u32 phase = 1;
#pragma unroll 1
  for (int i = 0; i < count + kStages; ++i) {
    if (i >= kStages && i - kStages < count) ptx::mbarrier_wait(&full[stage], phase);
    if (i < count) {
      const int chunk = first + i * step;
      ptx::mbarrier_arrive_expect_tx(&full[stage], kChunkBytes);
      u8* to = smem + stage * kChunkBytes;
      if constexpr (kBoxes)
        ptx::tma_load_2d(to, &map, &full[stage], chunk % p.num_k_blocks * 128, chunk / p.num_k_blocks * kChunkRows);
      else
        ptx::bulk_load(to, p.data + i64(chunk) * kChunkBytes, kChunkBytes, &full[stage]);
    }
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
  ptx::grid_wait_dependencies();  // who comes after us relies on everything before us
}

}  // namespace phalanx::probe
