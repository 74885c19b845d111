// A barrier in its 8 bytes: arrivals that are missing, arrivals of a phase, the phase, bytes that are missing.
#pragma once
#include "device/ptx/memory.cuh"

namespace phalanx::ptx {

struct SimtMbarrier {
  u16 pending, count : 15, phase : 1;
  int bytes;

  void complete_if_done() {
    if (pending == 0 && bytes == 0) pending = count, phase ^= 1;
  }
  void arrive() { --pending, complete_if_done(); }
  void receive(int n) { bytes -= n, complete_if_done(); }
};
static_assert(sizeof(SimtMbarrier) == 8);

/// f(the barrier at this address in a CTA of the cluster).
template <class F>
auto with_mbarrier(u64* bar, int rank, F f) {
  const std::lock_guard lock(simt::cta->cluster->mutex);
  return f(*reinterpret_cast<SimtMbarrier*>(simt_in_cta(bar, rank)));
}
inline int simt_rank() { return simt::cta->rank; }

inline void mbarrier_init(u64* bar, u32 count) {
  with_mbarrier(bar, simt_rank(), [&](auto& b) { b = {u16(count), u16(count), 0, 0}; });
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(u64* bar, u32 bytes) {
  with_mbarrier(bar, simt_rank(), [&](auto& b) { b.bytes += int(bytes), b.arrive(); });
}
inline void mbarrier_arrive(u64* bar) {
  with_mbarrier(bar, simt_rank(), [](auto& b) { b.arrive(); });
}
inline void mbarrier_arrive_cluster(u64* bar, u32 cta_rank) {
  with_mbarrier(bar, int(cta_rank), [](auto& b) { b.arrive(); });
}
inline void mbarrier_arrive_cp_async(u64* bar) {
  simt::later([bar, copies = std::move(simt::fiber().open_group)] {
    for (const simt::AsyncCopy& copy : copies) copy.perform();
    mbarrier_arrive(bar);
  });
  simt::fiber().open_group.clear();
}
inline bool mbarrier_test(u64* bar, u32 phase) {
  const bool done = with_mbarrier(bar, simt_rank(), [&](auto& b) { return b.phase != phase; });
  if (!done) simt::yield();
  return done;
}
inline void mbarrier_wait(u64* bar, u32 phase) {
  while (!mbarrier_test(bar, phase)) continue;
}

template <class T>
void simt_store_async(void* p, T v, u64* bar, u32 cta_rank) {
  simt::later([=] {
    with_mbarrier(bar, int(cta_rank), [&](auto& b) {
      std::memcpy(simt_in_cta(p, int(cta_rank)), &v, sizeof v);
      b.receive(sizeof v);
    });
  });
}
inline void store_async_cluster_f2(void* p, float2 v, u64* bar, u32 cta_rank) { simt_store_async(p, v, bar, cta_rank); }
inline void store_async_cluster_f32(float* p, float v, u64* bar, u32 cta_rank) {
  simt_store_async(p, v, bar, cta_rank);
}

}  // namespace phalanx::ptx
