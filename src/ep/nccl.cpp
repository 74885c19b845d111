// The part of NCCL's API that we use, declared here and loaded with dlopen.
#include <dlfcn.h>
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "cuda/cuda.h"
#include "cuda/driver.h"
#include "ep/group.h"
#include "text/text.h"

namespace phalanx::ep {
namespace {

struct UniqueId {
  char bytes[128];
};
// ncclConfig_t as NCCL 2.14 had it; newer ones have defaults for the rest.
struct Config {
  std::size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef, version = 21400;
  int blocking = 0;
};
constexpr int kNcclInt8 = 0, kNcclInProgress = 7;

#define PHALANX_NCCL_FUNCTIONS(F)                                                           \
  F(ncclGetUniqueId, (UniqueId * id))                                                       \
  F(ncclCommInitRankConfig, (void** comm, int size, UniqueId id, int rank, Config* config)) \
  F(ncclCommGetAsyncError, (void* comm, int* state))                                        \
  F(ncclCommUserRank, (void* comm, int* rank))                                              \
  F(ncclCommCount, (void* comm, int* size))                                                 \
  F(ncclCommCuDevice, (void* comm, int* device))                                            \
  F(ncclCommAbort, (void* comm))                                                            \
  F(ncclAllGather, (const void* from, void* to, std::size_t count, int type, void* comm, cuda::CUstream stream))

struct Nccl {
#define PHALANX_DECLARE(name, arguments) int(*name) arguments = nullptr;
  PHALANX_NCCL_FUNCTIONS(PHALANX_DECLARE)
#undef PHALANX_DECLARE
  const char* (*ncclGetErrorString)(int) = nullptr;
  std::string error;
};

Nccl load() {
  Nccl n;
  const char* named = std::getenv("PHALANX_NCCL");
  const char* path = named && *named ? named : "libnccl.so.2";
  // A process has one NCCL, torch's perhaps, and a communicator belongs to it.
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  if (!library) library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    n.error = dlerror();
    return n;
  }
#define PHALANX_LOAD(name, arguments)                                 \
  n.name = reinterpret_cast<decltype(n.name)>(dlsym(library, #name)); \
  if (!n.name) n.error = format_text("{} lacks {}", path, #name);
  PHALANX_NCCL_FUNCTIONS(PHALANX_LOAD)
#undef PHALANX_LOAD
  n.ncclGetErrorString = reinterpret_cast<const char* (*)(int)>(dlsym(library, "ncclGetErrorString"));
  return n;
}

const Nccl& nccl() {
  static const auto& loaded = *new Nccl(load());
  if (!loaded.error.empty())
    throw Error(
        ErrorCode::unsupported,
        format_text("NCCL is not available: {}. Install nvidia-nccl-cu13, or let PHALANX_NCCL name libnccl.so.2",
                    loaded.error));
  return loaded;
}

void check(int result, const char* call) {
  if (result == 0) return;
  const char* text = nccl().ncclGetErrorString ? nccl().ncclGetErrorString(result) : "unknown error";
  throw Error(ErrorCode::cuda_error, format_text("{} failed: {}", call, text));
}
#define PHALANX_NCCL_CALL(call) check(nccl().call, #call)

// Of a communicator that does not block: until what `result` is of has been done. False if that took too long.
class Deadline {
 public:
  explicit Deadline(double seconds) : end_(Clock::now() + std::chrono::duration<double>(seconds)) {}

  bool is_over() const { return Clock::now() > end_; }
  bool wait(void* comm, int result, const char* call) const {
    while (result == kNcclInProgress) {
      if (is_over()) return false;
      std::this_thread::sleep_for(std::chrono::microseconds(50));
      PHALANX_NCCL_CALL(ncclCommGetAsyncError(comm, &result));
    }
    check(result, call);
    return true;
  }

 private:
  using Clock = std::chrono::steady_clock;
  const std::chrono::time_point<Clock, std::chrono::duration<double>> end_;
};

}  // namespace

std::string NcclComm::unique_id() {
  UniqueId id;
  PHALANX_NCCL_CALL(ncclGetUniqueId(&id));
  return {id.bytes, sizeof id.bytes};
}

std::shared_ptr<NcclComm> NcclComm::create(const std::string& text, int rank, int size, Device device, double timeout) {
  UniqueId id;
  if (text.size() != sizeof id.bytes)
    throw Error(ErrorCode::invalid_argument, format_text("Group::nccl: id has {} bytes, expected the {} of nccl_id()",
                                                         text.size(), sizeof id.bytes));
  std::memcpy(id.bytes, text.data(), sizeof id.bytes);
  const cuda::ContextGuard context(device.index);
  auto made = std::make_shared<NcclComm>();
  made->owned_ = true;  // from here on aborted, whatever comes
  made->rank = rank;
  made->size = size;
  made->device = device;
  Config config;
  const double patience = std::max(timeout, kLeastSecondsToJoin);
  const Deadline deadline(patience);
  const int result = nccl().ncclCommInitRankConfig(&made->comm_, size, id, rank, &config);
  if (!deadline.wait(made->comm_, result, "ncclCommInitRankConfig"))
    throw Error(ErrorCode::timeout,
                format_text("rank {} of {}: not all ranks joined over NCCL within {:g} s", rank, size, patience));
  return made;
}

std::shared_ptr<NcclComm> NcclComm::wrap(void* comm) {
  if (!comm) throw Error(ErrorCode::invalid_argument, "Group::nccl: comm is null, expected an ncclComm_t");
  auto wrapped = std::make_shared<NcclComm>();
  wrapped->comm_ = comm;
  PHALANX_NCCL_CALL(ncclCommUserRank(comm, &wrapped->rank));
  PHALANX_NCCL_CALL(ncclCommCount(comm, &wrapped->size));
  PHALANX_NCCL_CALL(ncclCommCuDevice(comm, &wrapped->device.index));
  return wrapped;
}

// Not ncclCommDestroy, which waits for the peers.
NcclComm::~NcclComm() {
  if (owned_ && comm_) nccl().ncclCommAbort(comm_);
}

std::vector<std::string> NcclComm::all_gather(const std::string& mine, double timeout) {
  const auto length = static_cast<std::uint64_t>(mine.size());
  const std::string lengths = gather_fixed({reinterpret_cast<const char*>(&length), sizeof length}, timeout);
  std::vector<std::uint64_t> sizes(size);
  std::memcpy(sizes.data(), lengths.data(), lengths.size());
  std::string padded = mine;
  padded.resize(std::max<std::uint64_t>(1, *std::max_element(sizes.begin(), sizes.end())));
  const std::string joined = gather_fixed(padded, timeout);
  std::vector<std::string> all(size);
  for (int r = 0; r < size; ++r) all[r] = joined.substr(r * padded.size(), sizes[r]);
  return all;
}

std::string NcclComm::gather_fixed(const std::string& mine, double timeout) {
  const cuda::ContextGuard context(device.index);
  struct Scratch {
    cuda::CUdeviceptr memory = 0;
    cuda::CUstream stream = nullptr;

    void forget() { memory = 0, stream = nullptr; }
    ~Scratch() {
      if (memory) cuda::driver().cuMemFree(memory);
      if (stream) cuda::driver().cuStreamDestroy(stream);
    }
  } scratch;
  const std::size_t bytes = mine.size();
  std::string all(bytes * size, '\0');
  PHALANX_CUDA(cuMemAlloc(&scratch.memory, bytes * (size + 1)));
  PHALANX_CUDA(cuStreamCreate(&scratch.stream, cuda::kStreamNonBlocking));
  PHALANX_CUDA(cuMemcpyHtoD(scratch.memory, mine.data(), bytes));
  const Deadline deadline(timeout);
  const auto give_up = [&] {
    scratch.forget();  // NCCL's kernel still has them: freeing would wait for it
    throw Error(ErrorCode::timeout,
                format_text("rank {} of {}: NCCL did not gather from all ranks within {:g} s", rank, size, timeout));
  };
  const int gathers =
      nccl().ncclAllGather(reinterpret_cast<void*>(scratch.memory), reinterpret_cast<void*>(scratch.memory + bytes),
                           bytes, kNcclInt8, comm_, scratch.stream);
  if (!deadline.wait(comm_, gathers, "ncclAllGather")) give_up();
  for (;;) {
    const cuda::CUresult result = cuda::driver().cuStreamQuery(scratch.stream);
    if (result == cuda::kSuccess) break;
    if (result != cuda::kNotReady) cuda::check(result, "ncclAllGather");
    if (deadline.is_over()) give_up();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  PHALANX_CUDA(cuMemcpyDtoH(all.data(), scratch.memory + bytes, all.size()));
  return all;
}

}  // namespace phalanx::ep
