#include "ep/memory.h"

#include <atomic>
#include <cstring>
#include <new>

#include "cuda/cuda.h"
#include "cuda/driver.h"
#include "device/ep/layout.h"
#include "text/text.h"

namespace phalanx::ep {
namespace {

using cuda::CUdeviceptr;

constexpr std::align_val_t kAlignment{256};

CUdeviceptr address(const Block& block) { return reinterpret_cast<CUdeviceptr>(block.get()); }

// Stop words are set while kernels wait on other streams, the default one among them perhaps.
class PrivateStream {
 public:
  PrivateStream() { PHALANX_CUDA(cuStreamCreate(&stream_, cuda::kStreamNonBlocking)); }
  ~PrivateStream() { cuda::driver().cuStreamDestroy(stream_); }
  PrivateStream(const PrivateStream&) = delete;
  PrivateStream& operator=(const PrivateStream&) = delete;

  void set(CUdeviceptr to, int value, std::size_t bytes) {
    PHALANX_CUDA(cuMemsetD8Async(to, static_cast<unsigned char>(value), bytes, stream_));
    PHALANX_CUDA(cuStreamSynchronize(stream_));
  }

 private:
  cuda::CUstream stream_ = nullptr;
};

}  // namespace

Block allocate_block(Device device, std::size_t bytes) {
  if (device.type == DeviceType::cpu) {
    void* memory = ::operator new(bytes, kAlignment, std::nothrow);
    if (!memory) throw Error(ErrorCode::unsupported, format_text("{} bytes of memory cannot be had", bytes));
    std::memset(memory, 0, bytes);
    return {memory, [](void* p) { ::operator delete(p, kAlignment); }};
  }
  const cuda::ContextGuard context(device.index);
  CUdeviceptr memory = 0;
  PHALANX_CUDA(cuMemAlloc(&memory, bytes));
  const Block block(reinterpret_cast<void*>(memory), [index = device.index](void* p) {
    cuda::release(index, [=] { cuda::driver().cuMemFree(reinterpret_cast<CUdeviceptr>(p)); });
  });
  PrivateStream().set(memory, 0, bytes);
  return block;
}

void enable_peer_access(int from, int to) {
  if (from == to) return;
  int reachable = 0;
  PHALANX_CUDA(cuDeviceCanAccessPeer(&reachable, cuda::handle_of(from), cuda::handle_of(to)));
  if (!reachable)
    throw Error(
        ErrorCode::unsupported,
        format_text("cuda:{} cannot reach the memory of cuda:{}: expert parallelism needs NVLink, or PCIe peer access",
                    from, to));
  const cuda::ContextGuard context(from);
  const cuda::CUresult result = cuda::driver().cuCtxEnablePeerAccess(cuda::context_of(to), 0);
  if (result != cuda::kPeerAccessAlreadyEnabled) cuda::check(result, "cuCtxEnablePeerAccess");
}

std::string export_block(const Block& block, Device device) {
  const cuda::ContextGuard context(device.index);
  cuda::IpcMemHandle handle;
  PHALANX_CUDA(cuIpcGetMemHandle(&handle, address(block)));
  return {handle.bytes, sizeof handle.bytes};
}

Block import_block(const std::string& description, Device device) {
  const cuda::ContextGuard context(device.index);
  cuda::IpcMemHandle handle;
  if (description.size() != sizeof handle.bytes)
    throw Error(ErrorCode::invalid_argument, "all_gather gave bytes that are not those of the peer");
  std::memcpy(handle.bytes, description.data(), sizeof handle.bytes);
  CUdeviceptr memory = 0;
  PHALANX_CUDA(cuIpcOpenMemHandle(&memory, handle, cuda::kIpcMemLazyEnablePeerAccess));
  return {reinterpret_cast<void*>(memory), [index = device.index](void* p) {
            cuda::release(index, [=] { cuda::driver().cuIpcCloseMemHandle(reinterpret_cast<CUdeviceptr>(p)); });
          }};
}

void fill(const Block& block, Device device, std::size_t begin, std::size_t bytes, int value) {
  if (device.type == DeviceType::cpu) {
    std::memset(static_cast<u8*>(block.get()) + begin, value, bytes);
    return;
  }
  const cuda::ContextGuard context(device.index);
  PrivateStream().set(address(block) + begin, value, bytes);
}

void set_stop_word(const Block& block, Device device, int value) {
  if (device.type == DeviceType::cpu) {
    std::atomic_ref(static_cast<EpWords*>(block.get())->stop).store(value, std::memory_order_release);
    return;
  }
  fill(block, device, 0, 1, value);
}

}  // namespace phalanx::ep
