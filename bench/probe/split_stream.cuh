// The ceiling of a split K: as weight_stream.cuh, but laid out as a decode GEMM has to be. The kSplit CTAs of a cluster
// share a tile of kRows weights; each streams its part of K, and then they sum kM x kRows partial results.
//
//     CTA r of a cluster:  stream k-blocks of part r -> write a partial tile -> cluster barrier
//                          -> sum rows r * kM / kSplit ... of all partial tiles through distributed shared memory -> D
#pragma once
#include "device/ptx/convert.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/sync.cuh"
#include "device/ptx/tma.cuh"

namespace phalanx::probe {

struct SplitStream {
  u32* d;  // BF16 pairs [kM, n]; n a multiple of 4
  int n, num_k_blocks;
  int reduce;      // 0: leave the sum out, and the cluster barriers with it
  int wait_first;  // for the previous kernel, before the first request; else before D is written
};

template <int kM, int kRows, int kSplit, int kStages>
struct SplitStreamLayout {
  static constexpr int kBoxBytes = kRows * 128, kRowFloats = kRows + 8;
  static constexpr int kPartial = kStages * kBoxBytes, kFull = kPartial + 4 * kM * kRowFloats;
  static constexpr int kTotal = kFull + 8 * kStages;
};

// 128 threads, one cluster a tile.
template <int kM, int kRows, int kSplit, int kStages>
__device__ __forceinline__ void split_stream(const TensorMap& map, const SplitStream& p) {
  using Layout = SplitStreamLayout<kM, kRows, kSplit, kStages>;
  extern __shared__ __align__(1024) u8 smem[];
  float* partial = reinterpret_cast<float*>(smem + Layout::kPartial);
  u64* full = reinterpret_cast<u64*>(smem + Layout::kFull);  // published by TMA, waited for by every thread
  const int part = blockIdx.x % kSplit, row0 = int(blockIdx.x / kSplit) * kRows;
  const int begin = p.num_k_blocks * part / kSplit, count = p.num_k_blocks * (part + 1) / kSplit - begin;

  ptx::grid_launch_dependents();
  const auto request = [&](int i) {
    ptx::mbarrier_arrive_expect_tx(&full[i % kStages], Layout::kBoxBytes);
    ptx::tma_load_2d(smem + i % kStages * Layout::kBoxBytes, &map, &full[i % kStages], (begin + i) * 128, row0);
  };
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) ptx::mbarrier_init(&full[s], 1);
    ptx::fence_mbarrier_init();
    if (p.wait_first) ptx::grid_wait_dependencies();
    for (int i = 0; i < min_of(kStages, count); ++i) request(i);  // all weights: nobody wrote them just now
  }
  __syncthreads();

  float x = 0;
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    ptx::mbarrier_wait(&full[i % kStages], i / kStages & 1);
    x += float(smem[i % kStages * Layout::kBoxBytes + threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0 && i + kStages < count) request(i + kStages);
  }
  ptx::grid_wait_dependencies();
  if (!p.reduce) {
    if (x < 0) p.d[threadIdx.x] = u32(x);  // never: bytes are not negative
    return;
  }

  for (int i = threadIdx.x; i < kM * kRows; i += 128) partial[i / kRows * Layout::kRowFloats + i % kRows] = x;
  ptx::cluster_sync();  // publishes every partial tile
  for (int i = threadIdx.x; i < kM / kSplit * kRows / 4; i += 128) {
    const int row = part * (kM / kSplit) + i / (kRows / 4), col = i % (kRows / 4) * 4;
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int peer = 0; peer < kSplit; ++peer) {
      const float4 v = ptx::load_cluster_f4(partial + row * Layout::kRowFloats + col, peer);
      sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    if (row0 + col >= p.n) continue;
    u32* d = p.d + (i64(row) * p.n + row0 + col) / 2;
    d[0] = ptx::pack_bf16(sum.x, sum.y), d[1] = ptx::pack_bf16(sum.z, sum.w);
  }
  ptx::cluster_sync();  // our shared memory lives until the peers have read it
}

}  // namespace phalanx::probe
