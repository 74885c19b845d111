#include "cli/machine.h"
#include "cuda/cuda.h"
#include "cuda/driver.h"
#include "text/text.h"

namespace phalanx::cli {
namespace {

class CudaMachine final : public Machine {
 public:
  explicit CudaMachine(int ordinal) : info_(cuda::device(ordinal)), context_(ordinal) {
    PHALANX_CUDA(cuEventCreate(&start_, 0));
    PHALANX_CUDA(cuEventCreate(&end_, 0));
    PHALANX_CUDA(cuMemAlloc(&flushed_, flushed_bytes()));
  }

  ~CudaMachine() override {
    cuda::driver().cuMemFree(flushed_);
    cuda::driver().cuEventDestroy(end_);
    cuda::driver().cuEventDestroy(start_);
  }

  std::string name() const override { return format_text("{} (cuda:{})", info_.name, info_.ordinal); }
  Device device() const override { return {DeviceType::cuda, info_.ordinal}; }

  std::shared_ptr<void> allocate(std::size_t bytes) override {
    cuda::CUdeviceptr memory = 0;
    PHALANX_CUDA(cuMemAlloc(&memory, bytes));
    return {reinterpret_cast<void*>(memory), [](void* pointer) {
              cuda::driver().cuMemFree(reinterpret_cast<cuda::CUdeviceptr>(pointer));  // waits for work that uses it
            }};
  }

  void upload(void* to, const void* from, std::size_t bytes) override {
    PHALANX_CUDA(cuMemcpyHtoD(reinterpret_cast<cuda::CUdeviceptr>(to), from, bytes));
  }

  double time(const std::function<void()>& work) override {
    // Overwriting the L2 also keeps the GPU busy until `work` is enqueued, so that the host's time is not measured.
    PHALANX_CUDA(cuMemsetD8Async(flushed_, 0, flushed_bytes(), nullptr));
    PHALANX_CUDA(cuEventRecord(start_, nullptr));
    work();
    PHALANX_CUDA(cuEventRecord(end_, nullptr));
    PHALANX_CUDA(cuEventSynchronize(end_));
    float milliseconds = 0;
    PHALANX_CUDA(cuEventElapsedTime(&milliseconds, start_, end_));
    return milliseconds * 1e-3;
  }

 private:
  std::size_t flushed_bytes() const { return 4 * info_.l2_bytes; }

  const cuda::DeviceInfo& info_;
  cuda::ContextGuard context_;
  cuda::CUevent start_ = nullptr, end_ = nullptr;
  cuda::CUdeviceptr flushed_ = 0;
};

}  // namespace

std::unique_ptr<Machine> open_cuda_machine(int ordinal) { return std::make_unique<CudaMachine>(ordinal); }

}  // namespace phalanx::cli
