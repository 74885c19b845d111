// An NCCL that pretends: libnccl.so.2 whose ranks are threads of one process and whose communicators never block. Device
// memory is the host's, as in driver.cpp.
#include "tests/driver/nccl.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace phalanx::test {

PretendedNccl& pretended_nccl() {
  static PretendedNccl instance;
  return instance;
}

}  // namespace phalanx::test

namespace {

using phalanx::test::pretended_nccl;

constexpr int kSuccess = 0, kInvalidArgument = 4, kInProgress = 7;

struct UniqueId {
  char bytes[128];
};

// The ranks of one id. All members are guarded by the mutex.
struct World {
  std::mutex mutex;
  int size = 0, joined = 0;
  struct Gather {
    int arrived = 0;
    std::vector<std::string> parts;
  };
  std::vector<Gather> gathers;  // in the order of calls
};

struct Comm {
  std::shared_ptr<World> world;
  int rank, size, device;
  std::size_t gathers = 0;  // begun
  char* to = nullptr;       // of the last one, until it has ended
};

std::mutex worlds_mutex;
std::map<std::string, std::shared_ptr<World>>& worlds() {
  static std::map<std::string, std::shared_ptr<World>> all;
  return all;
}

}  // namespace

extern "C" {

int ncclGetUniqueId(UniqueId* id) {
  static int next = 0;
  const std::lock_guard lock(worlds_mutex);
  std::memset(id, 0, sizeof *id);
  std::memcpy(id->bytes, &++next, sizeof next);
  return kSuccess;
}

int ncclCommGetAsyncError(void* handle, int* state) {
  Comm& comm = *static_cast<Comm*>(handle);
  const std::lock_guard lock(comm.world->mutex);
  *state = kInProgress;
  if (comm.world->joined < comm.size) return kSuccess;
  if (comm.to) {
    const World::Gather& gather = comm.world->gathers[comm.gathers - 1];
    if (gather.arrived < comm.size) return kSuccess;
    for (const std::string& part : gather.parts) comm.to = std::copy(part.begin(), part.end(), comm.to);
    comm.to = nullptr;
  }
  *state = kSuccess;
  return kSuccess;
}

int ncclCommInitRankConfig(void** handle, int size, UniqueId id, int rank, void*) {
  if (const int error = pretended_nccl().join_error) return error;
  std::shared_ptr<World> world;
  {
    const std::lock_guard lock(worlds_mutex);
    auto& found = worlds()[std::string(id.bytes, sizeof id.bytes)];
    if (!found) found = std::make_shared<World>();
    world = found;
  }
  {
    const std::lock_guard lock(world->mutex);
    world->size = size;
    ++world->joined;
  }
  ++pretended_nccl().joined;
  *handle = new Comm{world, rank, size, rank};
  return kInProgress;
}

int ncclCommUserRank(void* comm, int* rank) {
  if (!comm) return kInvalidArgument;
  return *rank = static_cast<Comm*>(comm)->rank, kSuccess;
}
int ncclCommCount(void* comm, int* size) { return *size = static_cast<Comm*>(comm)->size, kSuccess; }
int ncclCommCuDevice(void* comm, int* device) { return *device = static_cast<Comm*>(comm)->device, kSuccess; }
int ncclCommAbort(void* comm) {
  ++pretended_nccl().aborted;
  return delete static_cast<Comm*>(comm), kSuccess;
}

int ncclAllGather(const void* from, void* to, std::size_t count, int, void* handle, void*) {
  Comm& comm = *static_cast<Comm*>(handle);
  const std::lock_guard lock(comm.world->mutex);
  auto& gathers = comm.world->gathers;
  if (gathers.size() == comm.gathers) gathers.push_back({0, std::vector<std::string>(comm.size)});
  World::Gather& gather = gathers[comm.gathers++];
  gather.parts[comm.rank].assign(static_cast<const char*>(from), count);
  ++gather.arrived;
  comm.to = static_cast<char*>(to);
  return kInProgress;
}

const char* ncclGetErrorString(int result) { return result == 2 ? "unhandled pretended error" : "another error"; }

}  // extern "C"

namespace phalanx::test {

void* pretended_comm(const std::string& id, int rank, int size, int device) {
  UniqueId unique;
  std::memcpy(unique.bytes, id.data(), sizeof unique.bytes);
  void* comm = nullptr;
  ncclCommInitRankConfig(&comm, size, unique, rank, nullptr);
  static_cast<Comm*>(comm)->device = device;
  return comm;
}

void destroy_pretended_comm(void* comm) { delete static_cast<Comm*>(comm); }

}  // namespace phalanx::test
