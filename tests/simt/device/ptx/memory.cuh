#pragma once
#include "simt.h"

namespace phalanx::ptx {

inline uint4 load_cg_16(const void* from) { return *static_cast<const uint4*>(from); }
inline void prefetch_l2(const void*) {}
inline void cp_async_16(void* to, const void* from) { simt::fiber().open_group.push_back({to, from, 16}); }
inline void cp_async_4(void* to, const void* from) { simt::fiber().open_group.push_back({to, from, 4}); }
inline void cp_async_commit_group() {
  simt::fiber().groups.push_back(std::move(simt::fiber().open_group));
  simt::fiber().open_group.clear();
}
template <int kPending>
void cp_async_wait_group() {
  auto& groups = simt::fiber().groups;
  for (; int(groups.size()) > kPending; groups.pop_front())
    for (const simt::AsyncCopy& copy : groups.front()) copy.perform();
}

// --- shared memory ---------------------------------------------------------------------------------------------------

/// Counted from its beginning, as descriptors do.
inline u32 smem_addr(const void* p) { return u32(static_cast<const u8*>(p) - simt::cta->shared); }
/// What has this address in another CTA of the cluster.
inline u8* simt_in_cta(const void* p, int rank) { return simt::cta->cluster->ctas[rank]->shared + smem_addr(p); }
/// Where the 128-byte swizzle puts a byte.
inline u32 simt_swizzled(u32 address, int line = 128) { return address ^ (address >> 7 & (line / 16 - 1)) << 4; }

inline void fence_proxy_async() {}
inline void fence_proxy_async_global() {}
inline float4 load_cluster_f4(const void* p, u32 cta_rank) {
  float4 v;
  std::memcpy(&v, simt_in_cta(p, int(cta_rank)), sizeof v);
  return v;
}

/// Where this lane's pair lies in matrix i of four.
template <class F>
void simt_each_matrix(const void* row, F f) {
  const auto rows = simt::exchange(reinterpret_cast<u64>(row));
  for (int i = 0; i < 4; ++i) f(i, reinterpret_cast<u8*>(rows[i * 8 + simt::lane() / 4]) + simt::lane() % 4 * 4);
}
inline void stmatrix_x4(void* smem, const u32 (&r)[4]) {
  simt_each_matrix(smem, [&](int i, u8* to) { std::memcpy(to, &r[i], 4); });
}
inline void ldmatrix_x4(u32 (&r)[4], const void* smem) {
  simt_each_matrix(smem, [&](int i, const u8* from) { std::memcpy(&r[i], from, 4); });
}

}  // namespace phalanx::ptx
