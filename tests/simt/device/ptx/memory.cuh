#pragma once
#include "simt.h"

namespace phalanx::ptx {

inline uint4 load_cg_16(const void* from) { return *static_cast<const uint4*>(from); }
inline void cp_async_16(void* to, const void* from) { simt::fiber().open_group.push_back({to, from, 16}); }
inline void cp_async_commit_group() {
  simt::fiber().groups.push_back(std::move(simt::fiber().open_group));
  simt::fiber().open_group.clear();
}
template <int kPending>
void cp_async_wait_group() {
  auto& groups = simt::fiber().groups;
  for (; int(groups.size()) > kPending; groups.pop_front())
    for (const simt::AsyncCopy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
}

}  // namespace phalanx::ptx
