#pragma once
#include "simt.h"

namespace phalanx::ptx {

template <class T>
std::atomic_ref<T> simt_atomic(const T* p) {
  return std::atomic_ref<T>(*const_cast<T*>(p));
}

/// Spins end in it: others may run.
inline u64 load_acquire_sys(const u64* p) {
  const u64 value = simt_atomic(p).load(std::memory_order_acquire);
  simt::yield();
  return value;
}
inline u64 load_relaxed_sys(const u64* p) {
  const u64 value = simt_atomic(p).load(std::memory_order_relaxed);
  simt::yield();
  return value;
}
inline void store_relaxed_sys(u64* p, u64 value) { simt_atomic(p).store(value, std::memory_order_release); }
inline void store_release_sys(int* p, int value) { simt_atomic(p).store(value, std::memory_order_release); }
inline void store_release_sys(u64* p, u64 value) { simt_atomic(p).store(value, std::memory_order_release); }
inline void fence_acq_rel_cta() { simt::yield(); }
inline u64 atomic_exchange_relaxed_gpu(u64* p, u64 value) { return simt_atomic(p).exchange(value); }
inline void nanosleep(u32) { simt::yield(); }
inline u64 global_timer() {
  return u64(std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1));
}

}  // namespace phalanx::ptx
