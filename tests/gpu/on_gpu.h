// What C++ tests on the GPU share.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <optional>

#include "cuda/cuda.h"
#include "cuda/driver.h"
#include "tests/cpu/matrix.h"

namespace phalanx::test {

class OnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cuda::devices().empty() || !cuda::device(0).is_hopper()) GTEST_SKIP() << "no Hopper GPU";
    context_.emplace(0);
  }

 private:
  std::optional<cuda::ContextGuard> context_;
};

/// A matrix's whole memory on the GPU, and a view of its elements there.
template <class T>
class DeviceCopy {
 public:
  explicit DeviceCopy(Matrix<T>& host) : host_(host), view_(host.tensor()) {
    PHALANX_CUDA(cuMemAlloc(&memory_, bytes()));
    PHALANX_CUDA(cuMemcpyHtoD(memory_, host.memory().data(), bytes()));
    const auto offset = static_cast<char*>(view_.data) - reinterpret_cast<char*>(host.memory().data());
    view_.data = reinterpret_cast<void*>(memory_ + offset);
    view_.device = {DeviceType::cuda, 0};
  }
  ~DeviceCopy() { cuda::driver().cuMemFree(memory_); }
  DeviceCopy(const DeviceCopy&) = delete;
  DeviceCopy& operator=(const DeviceCopy&) = delete;

  const Tensor& tensor() const { return view_; }
  Matrix<T> download() const {
    Matrix<T> copy = host_;
    PHALANX_CUDA(cuCtxSynchronize());
    PHALANX_CUDA(cuMemcpyDtoH(copy.memory().data(), memory_, bytes()));
    return copy;
  }

 private:
  std::size_t bytes() const { return host_.memory().size() * sizeof(T); }

  Matrix<T>& host_;
  Tensor view_;
  cuda::CUdeviceptr memory_ = 0;
};

}  // namespace phalanx::test
