// Warps, warpgroups, clusters and grids.
#pragma once
#include "device/types.h"

namespace phalanx::ptx {

// True in one thread of a fully active warp.
__device__ __forceinline__ bool elect_one() {
  u32 elected;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
  return elected;
}

// The compiler can neither recompute `x` later nor see where it came from.
template <class Int>
__device__ __forceinline__ void keep_in_register(Int& x) {
  asm volatile("" : "+r"(x));
}

// Registers move from producers, who need few, to consumers, who hold the tile. By a whole warpgroup.
template <int kCount>
__device__ __forceinline__ void register_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void register_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

__device__ __forceinline__ void named_barrier_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
// The same from different places in the program, one for each role: not .aligned, as bar.sync is.
__device__ __forceinline__ void barrier_sync(int id, int num_threads) {
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
// As named_barrier_sync; true for all threads if it is for each. Lanes that have waited for different words must meet
// first.
__device__ __forceinline__ bool named_barrier_all(int id, int num_threads, bool mine) {
  u32 all;
  __syncwarp();
  asm volatile(
      "{ .reg .pred mine, all;\n"
      "setp.ne.u32 mine, %3, 0;\n"
      "bar.red.and.pred all, %1, %2, mine;\n"
      "selp.u32 %0, 1, 0, all; }"
      : "=r"(all)
      : "r"(id), "r"(num_threads), "r"(u32(mine))
      : "memory");
  return all;
}
// Counts for those who wait in named_barrier_sync, and goes on.
__device__ __forceinline__ void named_barrier_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

__device__ __forceinline__ u32 cluster_ctarank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Programmatic dependent launch: let the next kernel of the stream start, and wait until the previous one is complete
// and its writes are visible. Both do nothing in a kernel that was launched without the attribute.
__device__ __forceinline__ void grid_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void grid_wait_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace phalanx::ptx
