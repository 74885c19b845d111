// Plans and their kernels, remembered by what they were made for: a server sees the same few thousands again and again.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "cuda/cuda.h"
#include "jit/kernels.h"
#include "ops/kernel.h"
#include "plan/plan.h"

namespace phalanx {

struct PlannedGemm {
  plan::GemmPlan plan;
  const cuda::Kernel* kernel;
};

inline PlannedGemm with_kernel(const plan::GemmPlan& plan, int device) {
  return {plan, &load_kernel(device, jit::gemm_source(plan.config), smem_layout(plan.config).total)};
}

/// For tuning: a process that starts with PHALANX_GEMM_CONFIG in its environment reads it again at every call. Null if
/// there is nothing in it.
inline const char* tuning_config() {
  static const bool on = std::getenv("PHALANX_GEMM_CONFIG") != nullptr;
  const char* text = on ? std::getenv("PHALANX_GEMM_CONFIG") : nullptr;
  return text && *text ? text : nullptr;
}

/// `Key` is hashed by its member hash().
template <class Key>
class PlanCache {
 public:
  template <class Make>
  PlannedGemm get(const Key& key, const Make& make) {
    {
      std::shared_lock lock(mutex_);
      if (const auto it = plans_.find(key); it != plans_.end()) return it->second;
    }
    const PlannedGemm planned = make();  // outside the lock: may take a compilation
    std::unique_lock lock(mutex_);
    if (plans_.size() >= kMaxPlans) plans_.clear();
    plans_.emplace(key, planned);
    return planned;
  }

 private:
  static constexpr std::size_t kMaxPlans = 65536;
  struct Hash {
    std::size_t operator()(const Key& key) const { return key.hash(); }
  };

  std::shared_mutex mutex_;
  std::unordered_map<Key, PlannedGemm, Hash> plans_;
};

/// Of some integers.
template <class... Ints>
std::size_t hash_of(Ints... ints) {
  std::uint64_t h = 0;
  for (const int x : {static_cast<int>(ints)...})
    h = (h ^ static_cast<std::uint32_t>(x)) * 0x9e3779b97f4a7c15ull, h ^= h >> 29;
  return h;
}

}  // namespace phalanx
