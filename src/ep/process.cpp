// Ranks that are processes of one host, each with its GPU.
#include <unistd.h>

#include <fstream>

#include "cuda/cuda.h"
#include "ep/group.h"
#include "ep/memory.h"
#include "text/text.h"

namespace phalanx::ep {
namespace {

// CUDA IPC works within a running system: two containers of one host share this id, two hosts do not.
std::string host_id() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  char name[256] = {};
  if (id.empty() && gethostname(name, sizeof name - 1) == 0) id = name;
  return id;
}

class ProcessGroup final : public GroupState {
 public:
  ProcessGroup(int my_rank, int num_ranks, Device my_device, AllGather all_gather, const GroupOptions& options)
      : GroupState(my_rank, num_ranks, my_device, options), all_gather_(std::move(all_gather)) {}

 private:
  std::vector<std::string> exchange(const std::string& mine, const char*) override { return all_gather_(mine); }

  std::string describe(const Block& mine) override { return host_id() + "\n" + export_block(mine, device); }

  Block reach(int peer, const std::string& description) override {
    const auto end = description.find('\n');
    if (description.substr(0, end) != host_id())
      throw Error(
          ErrorCode::unsupported,
          format_text("rank {} is on another host; expert parallelism works within one NVLink domain of one host",
                      peer));
    return import_block(description.substr(end + 1), device);
  }

  const AllGather all_gather_;
};

}  // namespace

void check_process(const char* function, int rank, int size, Device device, const GroupOptions& options) {
  check_size(function, size, options);
  if (rank < 0 || rank >= size)
    throw Error(ErrorCode::invalid_argument, format_text("{}: rank is {}, expected 0 to {}", function, rank, size - 1));
  if (device.type != DeviceType::cuda)
    throw Error(
        ErrorCode::invalid_device,
        format_text("{}: device is the CPU; ranks on the CPU are threads of one process, Group::local", function));
  cuda::require_hopper(device.index);
}

std::shared_ptr<GroupState> make_process(int rank, int size, Device device, AllGather all_gather,
                                         const GroupOptions& options) {
  check_process("Group::process", rank, size, device, options);
  if (!all_gather) throw Error(ErrorCode::invalid_argument, "Group::process: all_gather is empty");
  return std::make_shared<ProcessGroup>(rank, size, device, std::move(all_gather), options);
}

}  // namespace phalanx::ep
