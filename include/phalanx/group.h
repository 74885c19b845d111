// A group of ranks that reach each other's memory: one GPU each, or threads of one process.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "phalanx/export.h"
#include "phalanx/tensor.h"

namespace phalanx {

namespace ep {
class GroupState;
}

struct GroupOptions {
  double timeout = 30;  ///< seconds that a rank waits for another before it gives up with Error timeout
};

/// Called by every rank at the same point with bytes of its own; returns those of all, in the order of ranks. A peer
/// that does not come is for it to notice: it should throw then.
using AllGather = std::function<std::vector<std::string>(const std::string& mine)>;

/// One rank's membership. Operations on a group are collective: every rank makes the same ones in the same order.
///
/// Errors with code timeout name the rank, the peer that did not come, and what was awaited. They leave the CUDA
/// context healthy; after one the group is of no use but to be closed, and a new one may be made.
class PHALANX_API Group {
 public:
  /// Ranks that are threads of this process, one for each device named: CPUs, GPUs, or one of them several times. All
  /// are returned at once, each for its thread.
  /// @throws Error invalid_argument (no rank, or CPUs and GPUs mixed), unsupported (no Hopper, or GPUs that cannot
  /// reach each other)
  static std::vector<Group> local(const std::vector<Device>& devices, const GroupOptions& options = {});

  /// One process a GPU, on one host. Memory is shared by CUDA IPC, whose handles go through `all_gather`: any means
  /// will do, MPI, a torch process group, files.
  static Group process(int rank, int size, Device device, AllGather all_gather, const GroupOptions& options = {});

  /// The same over an `ncclComm_t`, which must outlive the group. NCCL is loaded at run time.
  /// @throws Error invalid_argument (null), unsupported (no NCCL, or no Hopper)
  static Group nccl(void* comm, const GroupOptions& options = {});

  /// The same over a communicator of its own, made from an id that one rank got from `nccl_id` and spread. Waits for
  /// all ranks as long as options.timeout, but at least 30 s.
  static Group nccl(const std::string& id, int rank, int size, Device device, const GroupOptions& options = {});
  static std::string nccl_id();

  int rank() const;
  int size() const;
  Device device() const;
  double timeout() const;

  /// Until every rank has come.
  /// @throws Error timeout, naming the ranks that have not
  void barrier();

  /// Every rank of the group that waits, or will wait, gives up: its next call throws Error aborted. Callable from any
  /// thread; for local groups it reaches all ranks, and for others those whose memory this rank has mapped.
  void abort();

  /// Leaves the group. Local: no rank may be inside an operation. Between processes every rank first waits for its
  /// streams, then all for each other with `barrier`: peers' last kernels may still write to this rank's memory. The
  /// last owner does the same.
  void close();

  const std::shared_ptr<ep::GroupState>& state() const { return state_; }

 private:
  explicit Group(std::shared_ptr<ep::GroupState> state) : state_(std::move(state)) {}
  std::shared_ptr<ep::GroupState> state_;
};

}  // namespace phalanx
