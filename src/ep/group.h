// What a group is made of: a means to exchange a few bytes between hosts, and memory that all ranks reach. Operations
// put bytes there and then signal; they know no more of the transport.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "phalanx/group.h"
#include "phalanx/status.h"

namespace phalanx::ep {

/// Zeroed memory of one rank, freed with the last rank that can reach it.
using Block = std::shared_ptr<void>;

/// One block a rank, all of one size, as this rank reaches them.
struct SymmetricMemory {
  std::vector<Block> blocks;
  std::size_t bytes = 0;
};

class GroupState {
 public:
  GroupState(int my_rank, int num_ranks, Device my_device, const GroupOptions& options)
      : rank(my_rank), size(num_ranks), device(my_device), timeout(options.timeout) {}
  virtual ~GroupState() = default;
  GroupState(const GroupState&) = delete;
  GroupState& operator=(const GroupState&) = delete;

  const int rank, size;
  const Device device;
  const double timeout;  ///< seconds

  /// Collective and bounded. `what` is named by the error.
  /// @throws Error timeout, aborted
  std::vector<std::string> all_gather(const std::string& mine, const char* what);
  void barrier() { all_gather("", "a barrier"); }

  /// Collective.
  /// @throws Error on every rank if any fails
  std::shared_ptr<SymmetricMemory> allocate(std::size_t bytes);

  /// Sets the stop word of every block that this rank reaches, and refuses further work.
  void abort();
  void close() { fail(ErrorCode::aborted, "the group has been closed"); }

  /// From now on `check` throws this; the first failure counts.
  void fail(ErrorCode code, const std::string& message);
  /// @throws Error what `fail` was told, or that another rank has aborted the group
  void check() const;

 protected:
  virtual std::vector<std::string> exchange(const std::string& mine, const char* what) = 0;
  /// This rank's block as bytes for the others, and theirs from such bytes.
  virtual std::string describe(const Block& mine) = 0;
  virtual Block reach(int peer, const std::string& description) = 0;
  virtual void on_abort() {}
  /// Who is known to have aborted the group; -1: nobody.
  virtual int aborter() const { return -1; }

 private:
  std::atomic<bool> failed_{false};
  mutable std::mutex mutex_;  // of what follows
  ErrorCode code_{};
  std::string message_;
  std::vector<std::weak_ptr<SymmetricMemory>> memories_;
};

/// @throws Error invalid_argument unless there may be such a group
void check_size(const char* function, int size, const GroupOptions& options);

/// Ranks of one process.
std::vector<std::shared_ptr<GroupState>> make_local(const std::vector<Device>& devices, const GroupOptions& options);
/// @throws Error invalid_argument, invalid_device, unsupported unless a process with a GPU may be that rank
void check_process(const char* function, int rank, int size, Device device, const GroupOptions& options);
std::shared_ptr<GroupState> make_process(int rank, int size, Device device, AllGather all_gather,
                                         const GroupOptions& options);

// --- NCCL, loaded at run time: it only carries a few bytes between hosts --------------------------------------------

/// A communicator made here, or the caller's.
class NcclComm {
 public:
  static constexpr double kLeastSecondsToJoin = 30;

  static std::string unique_id();
  /// Waits for the others so many seconds, and no less than kLeastSecondsToJoin: processes begin at different times.
  static std::shared_ptr<NcclComm> create(const std::string& id, int rank, int size, Device device, double timeout);
  static std::shared_ptr<NcclComm> wrap(void* comm);
  ~NcclComm();

  int rank = 0, size = 0;
  Device device{DeviceType::cuda, 0};
  std::vector<std::string> all_gather(const std::string& mine, double timeout);

 private:
  std::string gather_fixed(const std::string& mine, double timeout);
  void* comm_ = nullptr;
  bool owned_ = false;
};

}  // namespace phalanx::ep
