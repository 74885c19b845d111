// Memory for the examples: of the CPU, or after use_gpu managed memory, which CPU and GPU reach at the same address. It
// is taken from the driver directly, so that nothing of CUDA is needed to build them; with the toolkit at hand it would
// be cudaMallocManaged and cudaDeviceSynchronize.
#pragma once

#include <dlfcn.h>
#include <phalanx/phalanx.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace memory {

inline phalanx::Device device;  // the CPU

/// A function of the driver's, which returns 0 where all is well.
template <class... Arguments>
void driver(const char* name, Arguments... arguments) {
  static void* const library = dlopen("libcuda.so.1", RTLD_NOW);
  using Function = int (*)(Arguments...);
  const auto function = library ? reinterpret_cast<Function>(dlsym(library, name)) : nullptr;
  if (!function) throw std::runtime_error(std::string("there is no CUDA driver with ") + name);
  if (const int result = function(arguments...))
    throw std::runtime_error(std::string(name) + " returned " + std::to_string(result));
}

/// All memory that is allocated from here on. Call it on each thread.
inline void use_gpu(int index) {
  void* context = nullptr;
  driver("cuInit", 0u);
  driver("cuDevicePrimaryCtxRetain", &context, index);
  driver("cuCtxSetCurrent", context);
  device = {phalanx::DeviceType::cuda, index};
}

/// Until the GPU has done what it was told.
inline void synchronize() {
  if (device.type == phalanx::DeviceType::cuda) driver("cuCtxSynchronize");
}

template <class T>
struct Allocator {
  using value_type = T;

  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}

  T* allocate(std::size_t count) {
    constexpr unsigned kAttachGlobal = 1;
    if (device.type == phalanx::DeviceType::cpu) return static_cast<T*>(::operator new(count * sizeof(T)));
    unsigned long long address = 0;
    driver("cuMemAllocManaged", &address, count * sizeof(T), kAttachGlobal);
    return reinterpret_cast<T*>(address);
  }
  void deallocate(T* memory, std::size_t) {
    if (device.type == phalanx::DeviceType::cpu)
      ::operator delete(memory);
    else
      driver("cuMemFree_v2", static_cast<unsigned long long>(reinterpret_cast<std::uintptr_t>(memory)));
  }
  bool operator==(const Allocator&) const { return true; }
};

template <class T>
using Vector = std::vector<T, Allocator<T>>;

}  // namespace memory
