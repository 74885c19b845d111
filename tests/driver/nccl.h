// What the pretended NCCL has seen, for tests that are linked with it.
#pragma once

#include <atomic>
#include <string>

namespace phalanx::test {

struct PretendedNccl {
  std::atomic<int> joined{0}, aborted{0};  ///< communicators
  std::atomic<int> join_error{0};          ///< what the next ranks that join get
};

PretendedNccl& pretended_nccl();

/// A communicator as a caller brings it.
void* pretended_comm(const std::string& id, int rank, int size, int device);
void destroy_pretended_comm(void* comm);

}  // namespace phalanx::test
