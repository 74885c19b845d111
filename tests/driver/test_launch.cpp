// The host's side of a CUDA product, from checks to the launch, over the pretended driver.
#include <gtest/gtest.h>

#include <atomic>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda/driver.h"
#include "phalanx/ep.h"
#include "phalanx/gemm.h"
#include "phalanx/gemm_bf16.h"
#include "phalanx/grouped.h"
#include "tests/driver/driver.h"
#include "tests/testing.h"

namespace phalanx::test {
namespace {

// A place of its own for so many bytes, which nobody reads.
void* somewhere(std::int64_t bytes) {
  static std::atomic<std::int64_t> next{1ll << 40};
  return reinterpret_cast<void*>(next.fetch_add((bytes + 511) / 256 * 256));
}
constexpr Device kCuda{DeviceType::cuda, 0};

// Operands of any shape.
class Product {
 public:
  Product(std::int64_t m, std::int64_t n, std::int64_t k, int ordinal = 0, int pad = 0, DType out = DType::bf16)
      : device_{DeviceType::cuda, ordinal} {
    const std::int64_t k_blocks = (k + 127) / 128, n_blocks = (n + 127) / 128, units = 16 / size_of(out);
    const auto padded = [](std::int64_t size, std::int64_t unit) { return (size + unit - 1) / unit * unit; };
    const std::int64_t row = padded(k, 16) + 16 * pad, out_row = padded(n, units) + units * pad;
    a = {row_major(somewhere(m * row), DType::e4m3, m, k, device_, row),
         col_major(somewhere(4 * (m + 4) * k_blocks), DType::f32, m, k_blocks, device_, padded(m, 4))};
    b = {row_major(somewhere(n * row), DType::e4m3, n, k, device_, row),
         row_major(somewhere(4 * n_blocks * k_blocks), DType::f32, n_blocks, k_blocks, device_)};
    d = row_major(somewhere(m * out_row * size_of(out)), out, m, n, device_, out_row);
  }

  void run(const GemmOptions& options = {}) const { gemm_fp8(a, b, d, options); }

  ScaledTensor a, b;
  Tensor d;

 private:
  Device device_;
};

class Launch : public testing::Test {
 protected:
  PretendedDriver& driver = pretended_driver();
};

TEST_F(Launch, RandomShapesMakeSoundMapsAndLaunches) {
  std::mt19937 rng(7);
  const auto size = [&] { return 1 + std::int64_t(rng() % (rng() % 3 == 0 ? 9000 : 300)); };
  for (int i = 0; i < 500; ++i) {
    Product product(size(), size(), size(), 0, int(rng() % 3), rng() % 2 ? DType::bf16 : DType::f32);
    if (rng() % 4 == 0) {  // scales that TMA cannot read
      const auto k_blocks = product.a.scales.cols();
      product.a.scales.strides = {k_blocks, 1};
    }
    GemmOptions options;
    if (rng() % 2) options.num_sms = 1 + int(rng() % (kSms - 1));
    options.batch_invariant = rng() % 4 == 0, options.constant_b = rng() % 2;
    if (rng() % 3 == 0) options.c = product.d;
    const int before = driver.launches;
    ASSERT_NO_THROW(product.run(options)) << to_string(product.a.data) << " " << to_string(product.d);
    ASSERT_EQ(driver.launches, before + 1);
    EXPECT_TRUE(driver.programmatic);
    EXPECT_EQ(driver.leaves_sms, options.num_sms > 0) << "so that the next kernel does not take what is left to others";
    if (options.num_sms > 0) {
      EXPECT_LE(driver.num_ctas, unsigned(options.num_sms)) << to_string(product.a.data);
    }
  }
}

TEST_F(Launch, ProductsOfEveryKindLeaveTheSmsThatTheyAreNotGiven) {
  constexpr int kRows = 4096, kGroups = 4, kColumns = 512, kDepth = 1024;
  const auto matrix = [](DType dtype, std::int64_t rows, std::int64_t cols) {
    return row_major(somewhere(rows * cols * size_of(dtype)), dtype, rows, cols, kCuda);
  };
  const auto stack = [](DType dtype, std::int64_t rows, std::int64_t cols) -> Tensor {
    void* data = somewhere(kGroups * rows * cols * size_of(dtype));
    return {data, dtype, kCuda, 3, {kGroups, rows, cols}, {rows * cols, cols, 1}};
  };
  const ScaledTensor a{matrix(DType::e4m3, kRows, kDepth),
                       col_major(somewhere(4 * kRows * kDepth / 128), DType::f32, kRows, kDepth / 128, kCuda)};
  const ScaledTensor experts{stack(DType::e4m3, kColumns, kDepth), stack(DType::f32, kColumns / 128, kDepth / 128)};
  const ScaledTensor q{matrix(DType::e4m3, kRows, kColumns / 2),
                       col_major(somewhere(4 * kRows * kColumns / 256), DType::f32, kRows, kColumns / 256, kCuda)};
  const Tensor offsets{somewhere(4 * (kGroups + 1)), DType::int32, kCuda, 1, {kGroups + 1}, {1}},
      d = matrix(DType::bf16, kRows, kColumns);
  const Tensor a_bf16 = matrix(DType::bf16, kRows, kDepth), b_bf16 = matrix(DType::bf16, kColumns, kDepth);
  const Tensor square = matrix(DType::f32, kRows, kRows), gradient = stack(DType::f32, kDepth, kDepth);
  for (const int num_sms : {0, 100, kSms}) {
    const auto expect = [&](const char* what) {
      EXPECT_EQ(driver.leaves_sms, num_sms == 100) << what << ", " << num_sms << " SMs";
      driver.leaves_sms = num_sms != 100;
    };
    driver.leaves_sms = num_sms != 100;
    GemmOptions options;
    GroupedGemmOptions of_groups;
    GroupedSwigluOptions of_swiglu;
    WgradOptions of_gradients;
    options.num_sms = of_groups.num_sms = of_swiglu.num_sms = of_gradients.num_sms = num_sms;
    gemm_bf16(a_bf16, b_bf16, d, options);
    expect("gemm_bf16");
    grouped_gemm_fp8(a, experts, offsets, d, of_groups);
    expect("grouped_gemm_fp8");
    grouped_gemm_bf16(a_bf16, stack(DType::bf16, kColumns, kDepth), offsets, d, of_groups);
    expect("grouped_gemm_bf16");
    grouped_gemm_fp8_swiglu(a, experts, offsets, q, of_swiglu);
    expect("grouped_gemm_fp8_swiglu");
    wgrad_fp8(a, a, square, of_gradients);
    expect("wgrad_fp8");
    grouped_wgrad_bf16(a_bf16, a_bf16, offsets, gradient, of_gradients);
    expect("grouped_wgrad_bf16");
  }
}

TEST_F(Launch, GoesToTheCallersStreamOnTheTensorsDevice) {
  for (int ordinal = 0; ordinal < kHoppers; ++ordinal) {
    int stream;
    GemmOptions options;
    options.stream.handle = &stream;
    Product(64, 256, 512, ordinal).run(options);
    EXPECT_EQ(driver.device, ordinal);
    EXPECT_EQ(driver.stream, &stream);
    cuda::CUcontext current = nullptr;
    cuda::driver().cuCtxGetCurrent(&current);
    EXPECT_EQ(current, nullptr) << "the caller's context is current again";
  }
}

TEST_F(Launch, NothingIsLaunchedForNoRowsOrWrongArguments) {
  const int before = driver.launches;
  Product(0, 256, 512).run();
  Product wrong(64, 256, 512);
  wrong.d.device.index = 1;
  EXPECT_THROW(wrong.run(), Error);
  EXPECT_EQ(driver.launches, before);
}

TEST_F(Launch, DevicesThatCannotServeAreNamed) {
  expect_error(ErrorCode::unsupported, {"cuda:2", "Pretended L4", "8.9", "9.0"},
               [] { Product(64, 256, 512, kHoppers).run(); });
  expect_error(ErrorCode::invalid_device, {"cuda:3", "there are 3"}, [] { Product(64, 256, 512, kDevices).run(); });
}

TEST_F(Launch, FaultsOfDevicesThatAreNotThereAreNone) {
  for (const int ordinal : {-5, 64, 100000000})
    expect_error(ErrorCode::invalid_device, {"cuda:" + std::to_string(ordinal)}, [&] {
      check_groups({DeviceType::cuda, ordinal});
    });
}

TEST_F(Launch, ExpertParallelismAsksForNoMoreSmsThanThereAre) {
  const auto groups = Group::local({kCuda});
  ExpertParallelConfig config{.hidden = 128, .num_experts = 4, .topk = 2, .max_tokens = 8, .num_sms = 200};
  expect_error(ErrorCode::unsupported, {"config.num_sms is 200", "at most 132"},
               [&] { ExpertParallel(groups[0], config); });
}

TEST_F(Launch, WhatOutlivesTheDriverEndsQuietly) {
  auto groups = Group::local({kCuda});
  std::optional<ExpertParallel> ep(std::in_place, groups[0],
                                   ExpertParallelConfig{.hidden = 128, .num_experts = 4, .topk = 2, .max_tokens = 8});
  driver.context_error = 4;  // CUDA_ERROR_DEINITIALIZED
  EXPECT_THROW(Product(64, 256, 512).run(), Error);
  ep.reset();
  groups.clear();
  driver.context_error = 0;
}

TEST_F(Launch, ErrorsOfTheDriverNameTheCall) {
  driver.launch_error = 719;
  expect_error(ErrorCode::cuda_error, {"cuLaunchKernelEx"}, [] { Product(64, 256, 512).run(); });
  driver.launch_error = 0;
  EXPECT_NO_THROW(Product(64, 256, 512).run());
}

TEST_F(Launch, ThreadsLoadAKernelOnceForEachDevice) {
  const int before = driver.loads;
  {
    std::vector<std::jthread> threads;
    for (int i = 0; i < 8; ++i)
      threads.emplace_back([i] {
        for (int call = 0; call < 100; ++call) Product(5, 72, 16, i % kHoppers, 0, DType::f32).run();
      });
  }
  EXPECT_LE(driver.loads - before, kHoppers);
}

}  // namespace
}  // namespace phalanx::test
