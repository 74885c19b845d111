// CUDA on the host, for tests of device code that moves and counts: a CTA is an OS thread, its threads are fibers of
// it.
//
// What is CUDA C++ (threadIdx, __shared__, warp intrinsics) is defined here; tests/simt/device/ptx stands in the place
// of device/ptx, by coming before it on the include path. A warp's collectives and a CTA's barriers really meet; CTAs
// run side by side, and so do the kernels of several ranks. Of weak memory it knows nothing: fences are whole.
#pragma once

#include <math.h>  // for the global names

#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/convert.h"
#include "device/types.h"

#define __device__
#define __forceinline__ inline
#define __noinline__ [[gnu::noinline]]
#define __shared__ thread_local
#define __align__(n)

namespace simt {

constexpr int kWarp = 32;

/// A copy that has begun; it happens when it is waited for, the latest time that is allowed.
struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;

  void perform() const { std::memcpy(to, from, bytes); }
};

/// Where a fiber, or its CTA's scheduler, goes on: the compiler's own, of frame, instruction and stack. Those of
/// ucontext.h enter the kernel at every switch.
using Context = void* [5];

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::uint64_t cluster_turn = 0;  // at which it has arrived
  std::vector<AsyncCopy> open_group;
  std::deque<std::vector<AsyncCopy>> groups;
  std::deque<std::function<void()>> products, stores;  // of WGMMA, of TMA: not done before they are waited for
  std::vector<std::function<void()>> open_stores;
};

struct Barrier {
  int arrived = 0;
  std::uint64_t turn = 0;
  bool vote = true, all = true;  // of those who have arrived; of the last turn
};

/// Where the lanes of a warp lay down a value each, and find everyone's.
struct Warp {
  std::array<std::uint64_t, kWarp> given, all;
  Barrier barrier;
};

struct Cta;

/// CTAs that see each other's shared memory.
struct Cluster {
  std::vector<Cta*> ctas;
  std::mutex mutex;  // of what the CTAs write into each other's memory
  int arrived = 0;
  std::uint64_t turn = 0;
};

struct Cta {
  int index = 0, num_ctas = 1, current = 0;  // current: the thread that runs
  Cluster* cluster = nullptr;
  int rank = 0;  // in the cluster
  unsigned char* shared = nullptr;
  std::vector<std::function<void()>> under_way;  // copies of TMA, in no order
  std::uint32_t random = 1;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::array<Barrier, 16> barriers;
  Context scheduler;
  const std::function<void()>* kernel = nullptr;
};

inline thread_local Cta* cta = nullptr;

/// Lets others run.
void yield();

/// Runs a kernel of `num_ctas` CTAs to its end. A CTA's dynamic shared memory holds NaN. Aborts if it takes minutes.
void launch(int num_ctas, int num_threads, const std::function<void()>& kernel, int cluster_size = 1);

/// Some time later, after other things that began later, or before them.
inline void later(std::function<void()> action) { cta->under_way.push_back(std::move(action)); }

inline Fiber& fiber() { return cta->fibers[cta->current]; }

inline void meet(Barrier& barrier, int count) {
  const std::uint64_t turn = barrier.turn;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.turn;
  }
  while (barrier.turn == turn) yield();
}

/// Every lane's value.
template <class T>
std::array<T, kWarp> exchange(T mine) {
  Warp& warp = cta->warps[cta->current / kWarp];
  std::memcpy(&warp.given[cta->current % kWarp], &mine, sizeof mine);
  // The last to come publishes; nobody can give again before all have read.
  const std::uint64_t turn = warp.barrier.turn;
  if (++warp.barrier.arrived == kWarp) {
    warp.all = warp.given;
    warp.barrier.arrived = 0;
    ++warp.barrier.turn;
  }
  while (warp.barrier.turn == turn) yield();
  std::array<T, kWarp> values;
  for (int i = 0; i < kWarp; ++i) std::memcpy(&values[i], &warp.all[i], sizeof(T));
  return values;
}

inline int lane() { return cta->current % kWarp; }

}  // namespace simt

// --- the language ---------------------------------------------------------------------------------------------------

/// Dynamic shared memory, by the name that kernels give it.
namespace phalanx {
extern thread_local unsigned char smem_base[];
}

struct SimtThreadIdx {
  struct {
    operator unsigned() const { return unsigned(simt::cta->current); }
  } x;
};
struct SimtBlockIdx {
  struct {
    operator unsigned() const { return unsigned(simt::cta->index); }
  } x;
};
struct SimtGridDim {
  struct {
    operator unsigned() const { return unsigned(simt::cta->num_ctas); }
  } x;
};
inline constexpr SimtThreadIdx threadIdx{};
inline constexpr SimtGridDim gridDim{};
struct SimtBlockDim {
  struct {
    operator unsigned() const { return unsigned(simt::cta->fibers.size()); }
  } x;
};
inline constexpr SimtBlockDim blockDim{};
inline constexpr SimtBlockIdx blockIdx{};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

template <class T>
T __shfl_sync(unsigned, T value, int source, int width = simt::kWarp) {
  const int first = simt::lane() / width * width;
  return simt::exchange(value)[first + source % width];
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = simt::lane();
  return simt::exchange(value)[lane >= distance ? lane - distance : lane];
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  const int lane = simt::lane();
  return simt::exchange(value)[lane ^ distance];
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned bits = 0;
  const auto all = simt::exchange(int(predicate));
  for (int i = 0; i < simt::kWarp; ++i) bits |= unsigned(all[i]) << i;
  return bits;
}
inline unsigned __activemask() { return 1u << simt::lane(); }  // of more nobody may be sure
inline bool __any_sync(unsigned mask, bool predicate) {
  return mask == __activemask() ? predicate : __ballot_sync(mask, predicate) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  unsigned bits = 0;
  for (const unsigned other : simt::exchange(value)) bits |= other;
  return bits;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  unsigned largest = 0;
  for (const unsigned other : simt::exchange(value)) largest = other > largest ? other : largest;
  return largest;
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  unsigned least = ~0u;
  for (const unsigned other : simt::exchange(value)) least = other < least ? other : least;
  return least;
}
inline unsigned __match_any_sync(unsigned, int value) {
  unsigned bits = 0;
  const auto all = simt::exchange(value);
  for (int i = 0; i < simt::kWarp; ++i) bits |= unsigned(all[i] == value) << i;
  return bits;
}
inline void __syncwarp() { simt::exchange(0); }
inline void __syncthreads() { simt::meet(simt::cta->barriers[0], int(simt::cta->fibers.size())); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((std::uint64_t(hi) << 32 | lo) >> (shift % 32));
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int __ffsll(unsigned long long x) { return x ? std::countr_zero(x) + 1 : 0; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }

/// Of shared memory: the threads of a CTA take turns.
inline int atomicAdd(int* p, int value) {
  const int old = *p;
  *p += value;
  return old;
}
inline int atomicOr(int* p, int bits) {
  const int old = *p;
  *p |= bits;
  return old;
}
