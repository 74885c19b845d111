// Where a benchmark runs: memory there, and a clock for work that is enqueued there.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "phalanx/stream.h"
#include "phalanx/tensor.h"

namespace phalanx::cli {

class Machine {
 public:
  virtual ~Machine() = default;

  virtual std::string name() const = 0;
  virtual Device device() const = 0;
  virtual Stream stream() const { return {}; }

  /// Memory of the device, 256-byte aligned, freed with the last owner.
  virtual std::shared_ptr<void> allocate(std::size_t bytes) = 0;
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;

  /// Seconds that one run of `work` takes with a cold L2 (on a GPU, of the GPU's time).
  virtual double time(const std::function<void()>& work) = 0;
};

/// @throws Error invalid_device, unsupported
std::unique_ptr<Machine> open_cuda_machine(int ordinal);

/// "cpu", "cuda" or "cuda:<ordinal>"; "auto" is the first supported GPU, or the CPU where there is none.
/// @throws Error invalid_device, unsupported
std::unique_ptr<Machine> open_machine(const std::string& device);

}  // namespace phalanx::cli
