#include "ep/group.h"

#include <mutex>
#include <tuple>

#include "device/ep/layout.h"
#include "ep/memory.h"
#include "text/text.h"

namespace phalanx::ep {

void check_size(const char* function, int size, const GroupOptions& options) {
  if (size < 1 || size > kEpMaxRanks)
    throw Error(ErrorCode::invalid_argument,
                format_text("{}: {} ranks, expected 1 to {}", function, size, kEpMaxRanks));
  if (!(options.timeout > 0 && options.timeout < 1e6))
    throw Error(ErrorCode::invalid_argument,
                format_text("{}: options.timeout is {:g} s, expected more than 0 and less than 1e6", function,
                            options.timeout));
}

void GroupState::fail(ErrorCode code, const std::string& message) {
  const std::lock_guard lock(mutex_);
  if (failed_) return;
  code_ = code;
  message_ = message;
  failed_ = true;
}

void GroupState::check() const {
  if (failed_.load(std::memory_order_acquire)) [[unlikely]] {
    const std::lock_guard lock(mutex_);
    throw Error(code_, message_);
  }
  if (const int who = aborter(); who >= 0) [[unlikely]]
    throw Error(ErrorCode::aborted, format_text("rank {} of {}: rank {} has aborted the group", rank, size, who));
}

std::vector<std::string> GroupState::all_gather(const std::string& mine, const char* what) {
  check();
  try {
    auto all = exchange(mine, what);
    if (static_cast<int>(all.size()) != size)
      throw Error(ErrorCode::invalid_argument,
                  format_text("all_gather returned {} items, expected {}, one a rank", all.size(), size));
    return all;
  } catch (const Error& error) {
    if (error.code() == ErrorCode::timeout) fail(error.code(), error.what());
    throw;
  }
}

std::shared_ptr<SymmetricMemory> GroupState::allocate(std::size_t bytes) {
  // Whoever fails says so instead of a description, so that all ranks throw together.
  constexpr auto kFailed = "!", kFine = "=";
  const auto attempt = [=](auto&& step) -> std::string {
    try {
      return std::string(kFine).append(step());
    } catch (const std::exception& error) {
      return std::string(kFailed) + error.what();
    }
  };
  const auto check_all = [&](const std::vector<std::string>& all) {
    for (int r = 0; r < size; ++r) {
      if (all[r].empty() || all[r].starts_with(kFailed))
        throw Error(ErrorCode::unsupported, format_text("rank {} of {}, sharing memory: {}", r, size,
                                                        all[r].empty() ? "no answer" : all[r].substr(1)));
    }
  };

  auto memory = std::make_shared<SymmetricMemory>();
  memory->bytes = bytes;
  memory->blocks.resize(size);
  const auto described = all_gather(attempt([&] {
                                      memory->blocks[rank] = allocate_block(device, bytes);
                                      return describe(memory->blocks[rank]);
                                    }),
                                    "symmetric memory");
  check_all(described);
  const auto reached = all_gather(attempt([&] {
                                    for (int r = 0; r < size; ++r)
                                      if (r != rank) memory->blocks[r] = reach(r, described[r].substr(1));
                                    return std::string();
                                  }),
                                  "peers to map symmetric memory");
  check_all(reached);
  const std::lock_guard lock(mutex_);
  std::erase_if(memories_, [](const auto& old) { return old.expired(); });
  memories_.push_back(memory);
  return memory;
}

void GroupState::abort() {
  fail(ErrorCode::aborted, format_text("rank {} of {} has aborted the group", rank, size));
  std::vector<std::shared_ptr<SymmetricMemory>> memories;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& weak : memories_)
      if (auto memory = weak.lock()) memories.push_back(std::move(memory));
  }
  on_abort();
  for (const auto& memory : memories)
    for (const Block& block : memory->blocks) set_stop_word(block, device, 1 + rank);
}

}  // namespace phalanx::ep

namespace phalanx {

std::vector<Group> Group::local(const std::vector<Device>& devices, const GroupOptions& options) {
  std::vector<Group> groups;
  for (auto& state : ep::make_local(devices, options)) groups.push_back(Group(std::move(state)));
  return groups;
}

Group Group::process(int rank, int size, Device device, AllGather all_gather, const GroupOptions& options) {
  return Group(ep::make_process(rank, size, device, std::move(all_gather), options));
}

namespace {

AllGather over_nccl(std::shared_ptr<ep::NcclComm> comm, double timeout) {
  return [comm = std::move(comm), timeout](const std::string& mine) { return comm->all_gather(mine, timeout); };
}

}  // namespace

Group Group::nccl(void* comm, const GroupOptions& options) {
  auto wrapped = ep::NcclComm::wrap(comm);
  const auto [rank, size, device] = std::tuple(wrapped->rank, wrapped->size, wrapped->device);
  return process(rank, size, device, over_nccl(std::move(wrapped), options.timeout), options);
}

Group Group::nccl(const std::string& id, int rank, int size, Device device, const GroupOptions& options) {
  ep::check_process("Group::nccl", rank, size, device, options);  // before the others wait for it
  auto comm = ep::NcclComm::create(id, rank, size, device, options.timeout);
  return process(rank, size, device, over_nccl(std::move(comm), options.timeout), options);
}

std::string Group::nccl_id() { return ep::NcclComm::unique_id(); }

int Group::rank() const { return state_->rank; }
int Group::size() const { return state_->size; }
Device Group::device() const { return state_->device; }
double Group::timeout() const { return state_->timeout; }
void Group::barrier() { state_->barrier(); }
void Group::abort() { state_->abort(); }
void Group::close() { state_->close(); }

}  // namespace phalanx
