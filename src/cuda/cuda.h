// The CUDA runtime layer: the driver API through dlopen, devices, kernels and launches. No CUDA header is needed to build.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace phalanx::cuda {

struct DriverInfo {
  bool available = false;
  int version = 0;    ///< 13000 for CUDA 13.0
  std::string error;  ///< why not, when unavailable
};
DriverInfo driver_info();

struct DeviceInfo {
  int ordinal = 0;
  std::string name;
  int major = 0, minor = 0, num_sms = 0, clock_khz = 0;
  std::size_t memory_bytes = 0, l2_bytes = 0;

  std::string arch() const;  ///< "sm_90a"
};
/// Empty when there is no driver or no GPU.
std::vector<DeviceInfo> devices();
/// @throws Error unsupported (no driver), invalid_device
const DeviceInfo& device(int ordinal);

}  // namespace phalanx::cuda
