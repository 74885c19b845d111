#include "cli/machine.h"

#include <charconv>
#include <chrono>
#include <cstring>
#include <new>
#include <string_view>
#include <thread>

#include "cuda/cuda.h"
#include "phalanx/status.h"
#include "text/text.h"

namespace phalanx::cli {
namespace {

constexpr std::string_view kCudaPrefix = "cuda:";

class CpuMachine final : public Machine {
 public:
  std::string name() const override { return format_text("CPU, {} threads", std::thread::hardware_concurrency()); }
  Device device() const override { return {}; }

  std::shared_ptr<void> allocate(std::size_t bytes) override {
    constexpr std::align_val_t kAlignment{256};
    return {::operator new(bytes, kAlignment), [](void* memory) { ::operator delete(memory, kAlignment); }};
  }

  void upload(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }

  double time(const std::function<void()>& work) override {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
};

}  // namespace

std::unique_ptr<Machine> open_machine(const std::string& device) {
  if (device == "cpu") return std::make_unique<CpuMachine>();
  if (device == "auto") {
    for (const auto& gpu : cuda::devices()) {
      if (gpu.is_hopper()) return open_cuda_machine(gpu.ordinal);
    }
    return std::make_unique<CpuMachine>();
  }
  if (device == "cuda") return open_cuda_machine(0);
  if (device.starts_with(kCudaPrefix)) {
    const char* const end = device.data() + device.size();
    int ordinal = 0;
    const auto [stop, error] = std::from_chars(device.data() + kCudaPrefix.size(), end, ordinal);
    if (error == std::errc{} && stop == end && ordinal >= 0) return open_cuda_machine(ordinal);
  }
  throw Error(ErrorCode::invalid_device,
              format_text("--device: {}; expected auto, cpu, cuda or cuda:<ordinal>", device));
}

}  // namespace phalanx::cli
