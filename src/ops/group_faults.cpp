#include "ops/group_faults.h"

#include <array>
#include <atomic>
#include <mutex>

#include "cuda/cuda.h"
#include "cuda/driver.h"
#include "device/gemm/groups.h"
#include "phalanx/status.h"
#include "text/text.h"

namespace phalanx {
namespace {

std::array<std::atomic<u64*>, cuda::kMaxDevices> words;

/// In the primary context, which outlives those that callers make.
u64* allocate_word(int ordinal) {
  const cuda::Driver& driver = cuda::driver();
  cuda::CUcontext previous = nullptr;
  PHALANX_CUDA(cuCtxGetCurrent(&previous));
  PHALANX_CUDA(cuCtxSetCurrent(cuda::context_of(ordinal)));
  void* memory = nullptr;
  const auto result =
      driver.cuMemHostAlloc(&memory, sizeof(u64), cuda::kMemHostAllocPortable | cuda::kMemHostAllocDeviceMap);
  driver.cuCtxSetCurrent(previous);
  cuda::check(result, "cuMemHostAlloc");
  *static_cast<u64*>(memory) = 0;
  return static_cast<u64*>(memory);
}

std::string describe(int ordinal, const GroupFault& fault) {
  const char *name = "offsets", *expected = "no less than the one before and within the matrix";
  switch (fault.by) {
    case GroupsBy::offsets:
      break;
    case GroupsBy::counts:
      name = "counts", expected = "0 to the rows of a group";
      break;
    case GroupsBy::row_groups:
      name = "row_groups", expected = "-1 or a group, the rows of each group together";
      break;
  }
  return format_text(
      "a grouped product on cuda:{} was given {}[{}] = {}; expected {}. It kept to what lies inside the matrices",
      ordinal, name, fault.index, fault.value, expected);
}

}  // namespace

u64* fault_word(int ordinal) {
  std::atomic<u64*>& slot = words[ordinal];
  if (u64* word = slot) return word;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (!slot) slot = allocate_word(ordinal);
  return slot;
}

void throw_fault(int ordinal) {
  u64* memory = words[ordinal];
  if (!memory) return;
  std::atomic_ref<u64> word(*memory);
  if (word.load(std::memory_order_relaxed) == 0) return;
  const u64 fault = word.exchange(0);
  if (fault != 0) throw Error(ErrorCode::invalid_argument, describe(ordinal, decode_fault(fault)));
}

}  // namespace phalanx
