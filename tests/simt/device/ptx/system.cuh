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
inline u32 load_relaxed_sys(const u32* p) {
  const u32 value = simt_atomic(p).load(std::memory_order_acquire);
  simt::yield();
  return value;
}
inline uint4 load_relaxed_sys_16(const void* p) {
  const u32* words = static_cast<const u32*>(p);
  u32 v[4];
  for (int i = 0; i < 4; ++i) v[i] = simt_atomic(words + i).load(std::memory_order_acquire);
  simt::yield();
  return {v[0], v[1], v[2], v[3]};
}
inline void store_relaxed_sys(u32* p, u32 value) { simt_atomic(p).store(value, std::memory_order_release); }
inline void store_relaxed_sys_16(void* p, uint4 v) {
  u32* words = static_cast<u32*>(p);
  const u32 values[] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) simt_atomic(words + i).store(values[i], std::memory_order_release);
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
