// Addresses, global and shared memory, and the fences between the proxies.
#pragma once
#include "device/types.h"

namespace phalanx::ptx {

__device__ __forceinline__ u32 smem_addr(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Makes this thread's plain writes to shared memory visible to TMA and WGMMA.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same of what it has written to global memory, or seen written there.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Reads shared memory of another CTA of the cluster, at the address that `p` has in this one.
__device__ __forceinline__ float4 load_cluster_f4(const void* p, u32 cta_rank) {
  float4 v;
  asm volatile(
      "{ .reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote]; }"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(smem_addr(p)), "r"(cta_rank)
      : "memory");
  return v;
}

__device__ __forceinline__ u32 load_cluster_u32(const void* p, u32 cta_rank) {
  u32 v;
  asm volatile(
      "{ .reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.u32 %0, [remote]; }"
      : "=r"(v)
      : "r"(smem_addr(p)), "r"(cta_rank)
      : "memory");
  return v;
}

// Writes to shared memory of a CTA of the cluster, at the address that `p` has in this one, and counts the bytes on the
// barrier there.
__device__ __forceinline__ void store_async_cluster_f2(void* p, float2 v, u64* bar, u32 cta_rank) {
  asm volatile(
      "{ .reg .b32 remote, remote_bar;\n"
      "mapa.shared::cluster.u32 remote, %0, %4;\n"
      "mapa.shared::cluster.u32 remote_bar, %3, %4;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [remote], {%1, %2}, [remote_bar]; }" ::"r"(
          smem_addr(p)),
      "f"(v.x), "f"(v.y), "r"(smem_addr(bar)), "r"(cta_rank)
      : "memory");
}

// The same of one.
__device__ __forceinline__ void store_async_cluster_f32(float* p, float v, u64* bar, u32 cta_rank) {
  asm volatile(
      "{ .reg .b32 remote, remote_bar;\n"
      "mapa.shared::cluster.u32 remote, %0, %3;\n"
      "mapa.shared::cluster.u32 remote_bar, %2, %3;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [remote], %1, [remote_bar]; }" ::"r"(
          smem_addr(p)),
      "f"(v), "r"(smem_addr(bar)), "r"(cta_rank)
      : "memory");
}

// 16 bytes past L1, which may hold what another GPU has overwritten since.
__device__ __forceinline__ uint4 load_cg_16(const void* global) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global)
               : "memory");
  return v;
}

// Starts to fetch the 128 bytes around `global` into the L2.
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Copies 4 bytes to shared memory in the background; mbarrier_arrive_cp_async tells when.
__device__ __forceinline__ void cp_async_4(void* smem, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_addr(smem)), "l"(global) : "memory");
}

// The same of 16 bytes, past L1; counted by groups of the thread.
__device__ __forceinline__ void cp_async_16(void* smem, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_addr(smem)), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last kPending groups of this thread have landed.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(void* smem, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_addr(smem)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_addr(smem))
               : "memory");
}

}  // namespace phalanx::ptx
