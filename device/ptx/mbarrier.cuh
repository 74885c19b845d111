// mbarrier: one wrapper per instruction.
#pragma once
#include "device/ptx/memory.cuh"

namespace phalanx::ptx {

__device__ __forceinline__ void mbarrier_init(u64* bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_addr(bar)), "r"(count) : "memory");
}

// Makes initialised barriers visible to the cluster and to the async proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival, and `bytes` more that TMA has to bring before the phase completes.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(u64* bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(bar)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u64* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_addr(bar)) : "memory");
}

// Arrives when this thread's earlier cp.async copies have landed.
__device__ __forceinline__ void mbarrier_arrive_cp_async(u64* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_addr(bar)) : "memory");
}

// Arrives at the same barrier of another CTA of the cluster. Not `.release.cluster`: that form emits a MEMBAR
// (measured: 40% of a GEMM), and who has only read shared memory has nothing to publish.
__device__ __forceinline__ void mbarrier_arrive_cluster(u64* bar, u32 cta_rank) {
  asm volatile(
      "{ .reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(smem_addr(bar)),
      "r"(cta_rank)
      : "memory");
}

// Whether that phase has completed.
__device__ __forceinline__ bool mbarrier_test(u64* bar, u32 phase) {
  u32 done;
  asm volatile(
      "{ .reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done; }"
      : "=r"(done)
      : "r"(smem_addr(bar)), "r"(phase)
      : "memory");
  return done;
}

// The hint lets a waiting warp sleep until the phase completes (at most so many nanoseconds) instead of spinning.
__device__ __forceinline__ void mbarrier_wait(u64* bar, u32 phase) {
  constexpr u32 kSuspendTimeHint = 10'000'000;
  asm volatile(
      "{ .reg .pred done;\n"
      "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@!done bra WAIT; }" ::"r"(smem_addr(bar)),
      "r"(phase), "r"(kSuspendTimeHint)
      : "memory");
}

}  // namespace phalanx::ptx
