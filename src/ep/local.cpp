// Ranks that are threads of one process.
#include <fmt/ranges.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>

#include "cuda/cuda.h"
#include "ep/group.h"
#include "ep/memory.h"
#include "text/text.h"

namespace phalanx::ep {
namespace {

/// Where local ranks meet.
struct Board {
  explicit Board(int size)
      : posted(size), slots{std::vector<std::string>(size), std::vector<std::string>(size)}, blocks(size) {}

  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::uint64_t> posted;  // exchanges that each rank has come to
  // In turn: nobody comes to the exchange after next before all have read this one.
  std::vector<std::string> slots[2];
  std::vector<std::weak_ptr<void>> blocks;
  std::atomic<int> aborter = -1;
};

class LocalGroup final : public GroupState {
 public:
  LocalGroup(int my_rank, const std::vector<Device>& devices, std::shared_ptr<Board> board, const GroupOptions& options)
      : GroupState(my_rank, static_cast<int>(devices.size()), devices[my_rank], options),
        devices_(devices),
        board_(std::move(board)) {}

 private:
  std::vector<std::string> exchange(const std::string& mine, const char* what) override {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout);
    std::unique_lock lock(board_->mutex);
    const std::uint64_t turn = ++board_->posted[rank];
    auto& slots = board_->slots[turn % 2];
    slots[rank] = mine;
    board_->changed.notify_all();
    const auto missing = [&] {
      std::vector<int> ranks;
      for (int r = 0; r < size; ++r)
        if (board_->posted[r] < turn) ranks.push_back(r);
      return ranks;
    };
    while (!missing().empty()) {
      if (board_->aborter >= 0)
        throw Error(ErrorCode::aborted, format_text("rank {} of {}, waiting for {}: rank {} has aborted the group",
                                                    rank, size, what, board_->aborter.load()));
      if (board_->changed.wait_until(lock, deadline) == std::cv_status::timeout && !missing().empty())
        throw Error(ErrorCode::timeout, format_text("rank {} of {}, waiting for {}: rank {} did not come within {:g} s",
                                                    rank, size, what, fmt::join(missing(), ", "), timeout));
    }
    return slots;
  }

  std::string describe(const Block& mine) override {
    const std::lock_guard lock(board_->mutex);
    board_->blocks[rank] = mine;
    return {};
  }

  Block reach(int peer, const std::string&) override {
    if (device.type == DeviceType::cuda) enable_peer_access(device.index, devices_[peer].index);
    const std::lock_guard lock(board_->mutex);
    return board_->blocks[peer].lock();  // its owner holds it until all have reached it
  }

  void on_abort() override {
    const std::lock_guard lock(board_->mutex);
    board_->aborter = rank;
    board_->changed.notify_all();
  }

  int aborter() const override { return board_->aborter; }

  const std::vector<Device> devices_;
  const std::shared_ptr<Board> board_;
};

}  // namespace

std::vector<std::shared_ptr<GroupState>> make_local(const std::vector<Device>& devices, const GroupOptions& options) {
  const int size = static_cast<int>(devices.size());
  check_size("Group::local", size, options);
  for (const Device& device : devices) {
    if (device.type != devices[0].type)
      throw Error(ErrorCode::invalid_argument, "Group::local: devices mix CPUs and GPUs; expected one kind");
    if (device.type == DeviceType::cuda) cuda::require_hopper(device.index);
  }
  const auto board = std::make_shared<Board>(size);
  std::vector<std::shared_ptr<GroupState>> groups;
  for (int r = 0; r < size; ++r) groups.push_back(std::make_shared<LocalGroup>(r, devices, board, options));
  return groups;
}

}  // namespace phalanx::ep
