// Every kernel that a planner can pick, on small shapes that reach its features: clusters, split-K, pipelines that
// wrap, ragged edges, C, both layouts of the scales. Short enough to run under each tool of compute-sanitizer.
//
// Operands are small integers with power-of-two scales: every sum is exact in every order, so the GPU must give the
// CPU's bits.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <string>

#include "cuda/cuda.h"
#include "cuda/driver.h"
#include "jit/kernels.h"
#include "phalanx/phalanx.h"
#include "plan/tuned.h"
#include "tests/cpu/matrix.h"
#include "tests/gpu/on_gpu.h"

namespace phalanx::test {
namespace {

// The process tunes: gemm_fp8 reads the variable at each call.
const bool kTuning = setenv("PHALANX_GEMM_CONFIG", "", 1) == 0;

struct Shape {
  int m, n, k;
};

// From now on gemm_fp8 runs this kernel.
void force(const GemmConfig& config) {
  const plan::GemmPlan plan{.config = config, .num_ctas = 0, .group_m = 8};
  setenv("PHALANX_GEMM_CONFIG", plan::format_plan(plan).c_str(), 1);
}

template <class T>
void check_gemm(const GemmConfig& config, const Shape& shape, bool with_c, Order sfa_order, std::mt19937& rng) {
  const auto& [m, n, k] = shape;
  const int k_blocks = (k + 127) / 128, n_blocks = (n + 127) / 128;
  const auto integer = [&](auto, auto) { return cpu::E4m3{std::uint8_t(nearest_e4m3(int(rng() % 5) - 2))}; };
  const auto power = [&](auto, auto) { return rng() % 2 ? 1.0f : 0.5f; };
  Matrix<cpu::E4m3> a(m, k, 1), b(n, k, 1);
  Matrix<float> sfa(m, k_blocks, 0, sfa_order), sfb(n_blocks, k_blocks);
  Matrix<T> c(m, n, 1), d(m, n, 2);
  a.fill(integer), b.fill(integer), sfa.fill(power), sfb.fill(power);
  c.fill([&](auto, auto) { return cpu::from_f32<T>(float(int(rng() % 17) - 8)); });

  DeviceCopy a_gpu(a), b_gpu(b);
  DeviceCopy sfa_gpu(sfa), sfb_gpu(sfb);
  DeviceCopy c_gpu(c), d_gpu(d);
  force(config);
  const auto options = [&](const Tensor& tensor) {
    return with_c ? GemmOptions{.c = tensor, .stream = {}, .num_sms = 0} : GemmOptions{};
  };
  gemm_fp8({a_gpu.tensor(), sfa_gpu.tensor()}, {b_gpu.tensor(), sfb_gpu.tensor()}, d_gpu.tensor(),
           options(c_gpu.tensor()));
  const Matrix<T> result = d_gpu.download();
  gemm_fp8({a.tensor(), sfa.tensor()}, {b.tensor(), sfb.tensor()}, d.tensor(), options(c.tensor()));

  ASSERT_TRUE(result.same_bytes(d)) << "the bits of the CPU's result, and poison all around it";
}

TEST_F(OnGpu, EveryGemmKernelGivesTheBitsOfTheCpu) {
  std::mt19937 rng(kSeed);
  // Ragged in each dimension; more k-blocks than any pipeline has stages; several tiles of several CTAs.
  const Shape shapes[] = {{1, 1, 1}, {3, 40, 100}, {8, 456, 1700}, {130, 200, 1000}, {300, 456, 1700}, {515, 129, 300}};
  for (const GemmConfig& config : plan::all_gemm_configs()) {
    for (const Shape& shape : shapes) {
      if (config.few_rows() && shape.m > config.block_m) continue;
      for (const bool with_c : {false, true}) {
        const Order order = with_c ? Order::row_major : Order::col_major;  // A's scales by cp.async, by TMA
        SCOPED_TRACE(::testing::Message() << jit::gemm_source(config).name << " " << shape.m << "x" << shape.n << "x"
                                          << shape.k << (with_c ? " with C" : ""));
        if (config.out == OutType::bf16)
          check_gemm<cpu::Bf16>(config, shape, with_c, order, rng);
        else
          check_gemm<float>(config, shape, with_c, order, rng);
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Weights so large that they leave L2 first.
TEST_F(OnGpu, GemmOfLargeWeightsGivesTheBitsOfTheCpu) {
  std::mt19937 rng(kSeed);
  const Shape shape{70, 8200, 1030};
  for (const GemmConfig& config : plan::all_gemm_configs()) {
    if (config.few_rows() || config.block_n != 64) continue;
    SCOPED_TRACE(jit::gemm_source(config).name);
    if (config.out == OutType::bf16)
      check_gemm<cpu::Bf16>(config, shape, false, Order::col_major, rng);
    else
      check_gemm<float>(config, shape, true, Order::row_major, rng);
    if (HasFatalFailure()) return;
  }
}

// Rows of D by every kernel and for several M, against the same rows by the first kernel that splits K as often:
// operands are any E4M3 bits, so that each rounding shows.
template <class T>
void check_equal_bits(OutType out, std::mt19937& rng) {
  constexpr int kRows = 300, kN = 456, kK = 1700, kKBlocks = (kK + 127) / 128;
  const auto code = [&](auto, auto) {
    const auto bits = std::uint8_t(rng());
    return cpu::E4m3{std::uint8_t((bits & 0x7f) == 0x7f ? 0 : bits)};
  };
  const auto scale = [&](auto, auto) { return std::exp2(float(rng() % 1000) / 250); };
  Matrix<cpu::E4m3> a(kRows, kK), b(kN, kK);
  Matrix<float> sfa(kRows, kKBlocks, 0, Order::col_major), sfb((kN + 127) / 128, kKBlocks);
  a.fill(code), b.fill(code), sfa.fill(scale), sfb.fill(scale);
  DeviceCopy a_gpu(a), b_gpu(b);
  DeviceCopy sfa_gpu(sfa), sfb_gpu(sfb);

  std::map<int, Matrix<T>> by_split;
  for (const GemmConfig& config : plan::all_gemm_configs()) {
    if (config.out != out || config.few_rows()) continue;  // the few rows' kernels sum K in parts of their own
    force(config);
    for (const int rows : {kRows, 1, 3, 64, 65, 129}) {
      SCOPED_TRACE(::testing::Message() << jit::gemm_source(config).name << ", " << rows << " rows");
      Matrix<T> d(rows, kN);
      DeviceCopy d_gpu(d);
      const auto first = [&](Tensor t) { return t.shape[0] = rows, t; };
      gemm_fp8({first(a_gpu.tensor()), first(sfa_gpu.tensor())}, {b_gpu.tensor(), sfb_gpu.tensor()}, d_gpu.tensor());
      const Matrix<T> result = d_gpu.download();
      const Matrix<T>& expected = by_split.try_emplace(config.split_k, result).first->second;
      int different = 0;
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < kN; ++j) different += std::memcmp(&result.at(i, j), &expected.at(i, j), sizeof(T)) != 0;
      ASSERT_EQ(different, 0);
    }
  }
  EXPECT_TRUE(by_split.contains(1));
}

TEST_F(OnGpu, EqualSplitsOfKGiveEqualBits) {
  std::mt19937 rng(kSeed);
  check_equal_bits<cpu::Bf16>(OutType::bf16, rng);
  check_equal_bits<float>(OutType::f32, rng);
}

template <class T>
void check_quantize(int m, int n, bool blocks, bool pow2_scales, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  Matrix<T> x(m, n, 1), y(m, n, 1);
  x.fill([&](auto i, auto j) {
    if ((i + 3 * j) % 97 == 0) return cpu::from_f32<T>(std::numeric_limits<float>::infinity());
    return cpu::from_f32<T>(i % 7 == 3 ? 0.0f : normal(rng));
  });
  Matrix<cpu::E4m3> q(m, n, 1);
  Matrix<float> scales(blocks ? (m + 127) / 128 : m, (n + 127) / 128, 0, blocks ? Order::row_major : Order::col_major);
  DeviceCopy<T> x_gpu(x), y_gpu(y);
  DeviceCopy<cpu::E4m3> q_gpu(q);
  DeviceCopy<float> scales_gpu(scales);

  const auto run = [&](const Tensor& in, const ScaledTensor& out, const Tensor& back) {
    (blocks ? quantize_blocks : quantize_rows)(in, out, {.pow2_scales = pow2_scales, .stream = {}});
    dequantize(out, back, {});
  };
  run(x_gpu.tensor(), {q_gpu.tensor(), scales_gpu.tensor()}, y_gpu.tensor());
  const auto q_result = q_gpu.download();
  const auto scales_result = scales_gpu.download();
  const auto y_result = y_gpu.download();
  run(x.tensor(), {q.tensor(), scales.tensor()}, y.tensor());
  ASSERT_TRUE(q_result.same_bytes(q));
  ASSERT_TRUE(scales_result.same_bytes(scales));
  ASSERT_TRUE(y_result.same_bytes(y));
}

template <class T>
void check_transposed(int m, int n, bool pow2_scales, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  Matrix<T> x(m, n, 1);
  x.fill([&](auto i, auto j) {
    if ((i + 3 * j) % 97 == 0) return cpu::from_f32<T>(std::numeric_limits<float>::quiet_NaN());
    return cpu::from_f32<T>(j % 7 == 3 ? 0.0f : normal(rng));
  });
  const DeviceCopy<T> x_gpu(x);
  const QuantizeOptions options{.pow2_scales = pow2_scales, .stream = {}};
  for (const bool both : {false, true}) {
    Matrix<cpu::E4m3> q(m, n, 1), q_t(n, m, 1);
    Matrix<float> scales(m, (n + 127) / 128, 0, Order::col_major), scales_t(n, (m + 127) / 128, 0, Order::col_major);
    const DeviceCopy<cpu::E4m3> q_gpu(q), q_t_gpu(q_t);
    const DeviceCopy<float> scales_gpu(scales), scales_t_gpu(scales_t);
    const auto run = [&](const Tensor& in, const ScaledTensor& rows, const ScaledTensor& columns) {
      both ? quantize_both(in, rows, columns, options) : quantize_transposed(in, columns, options);
    };
    run(x_gpu.tensor(), {q_gpu.tensor(), scales_gpu.tensor()}, {q_t_gpu.tensor(), scales_t_gpu.tensor()});
    run(x.tensor(), {q.tensor(), scales.tensor()}, {q_t.tensor(), scales_t.tensor()});
    ASSERT_TRUE(q_gpu.download().same_bytes(q));
    ASSERT_TRUE(q_t_gpu.download().same_bytes(q_t));
    ASSERT_TRUE(scales_gpu.download().same_bytes(scales));
    ASSERT_TRUE(scales_t_gpu.download().same_bytes(scales_t));
  }
}

TEST_F(OnGpu, EveryTransposingKernelGivesTheBytesOfTheCpu) {
  std::mt19937 rng(kSeed);
  for (const auto& [m, n] : {std::pair{1, 1}, {5, 304}, {130, 257}, {304, 128}}) {
    for (const bool pow2_scales : {false, true}) {
      SCOPED_TRACE(::testing::Message() << m << "x" << n);
      check_transposed<cpu::Bf16>(m, n, pow2_scales, rng);
      check_transposed<cpu::F16>(m, n, pow2_scales, rng);
      check_transposed<float>(m, n, pow2_scales, rng);
      if (HasFatalFailure()) return;
    }
  }
}

template <class T>
void check_swiglu(int m, int n, bool interleaved, float limit, std::mt19937& rng) {
  std::normal_distribution<float> normal(0, 4);
  const auto random = [&](auto, auto) { return cpu::from_f32<T>(normal(rng)); };
  Matrix<T> x(m, 2 * n, 1), grad(m, n, 1), grad_x(m, 2 * n, 1);
  Matrix<float> weights(1, m), grad_weights(1, m);
  Matrix<cpu::E4m3> q(m, n, 1);
  Matrix<float> scales(m, (n + 127) / 128, 0, Order::col_major);
  x.fill(random), grad.fill(random), weights.fill([&](auto, auto) { return normal(rng); });
  const DeviceCopy<T> x_gpu(x), grad_gpu(grad), grad_x_gpu(grad_x);
  const DeviceCopy<float> weights_gpu(weights), grad_weights_gpu(grad_weights), scales_gpu(scales);
  const DeviceCopy<cpu::E4m3> q_gpu(q);

  const auto vector = [](Tensor tensor) {
    tensor.ndim = 1, tensor.shape[0] = tensor.shape[1], tensor.strides[0] = 1;
    return tensor;
  };
  const auto run = [&](const Tensor& in, const ScaledTensor& out, const Tensor& dh, const Tensor& dx, const Tensor& w,
                       const Tensor& dw) {
    const SwigluOptions options{.interleaved = interleaved, .limit = limit, .weights = vector(w), .stream = {}};
    swiglu_quantize(in, out, options);
    swiglu_backward(in, dh, dx, vector(dw), options);
  };
  run(x_gpu.tensor(), {q_gpu.tensor(), scales_gpu.tensor()}, grad_gpu.tensor(), grad_x_gpu.tensor(),
      weights_gpu.tensor(), grad_weights_gpu.tensor());
  run(x.tensor(), {q.tensor(), scales.tensor()}, grad.tensor(), grad_x.tensor(), weights.tensor(),
      grad_weights.tensor());
  ASSERT_TRUE(q_gpu.download().same_bytes(q));
  ASSERT_TRUE(scales_gpu.download().same_bytes(scales));
  ASSERT_TRUE(grad_x_gpu.download().same_bytes(grad_x));
  const Matrix<float> sums = grad_weights_gpu.download();
  for (int i = 0; i < m; ++i) ASSERT_NEAR(sums.at(0, i), grad_weights.at(0, i), 1e-3 * n) << i;
}

/// E4M3 and its transpose with their scales, on the CPU and on the GPU.
struct QuantizedBoth {
  QuantizedBoth(int m, int n)
      : q(m, n, 1),
        q_t(n, m, 1),
        scales(m, (n + 127) / 128, 0, Order::col_major),
        scales_t(n, (m + 127) / 128, 0, Order::col_major) {}
  void expect_same_bytes() const {
    ASSERT_TRUE(q_gpu.download().same_bytes(q));
    ASSERT_TRUE(q_t_gpu.download().same_bytes(q_t));
    ASSERT_TRUE(scales_gpu.download().same_bytes(scales));
    ASSERT_TRUE(scales_t_gpu.download().same_bytes(scales_t));
  }
  ScaledTensor rows(bool gpu) {
    return gpu ? ScaledTensor{q_gpu.tensor(), scales_gpu.tensor()} : ScaledTensor{q.tensor(), scales.tensor()};
  }
  ScaledTensor transposed(bool gpu) {
    return gpu ? ScaledTensor{q_t_gpu.tensor(), scales_t_gpu.tensor()} : ScaledTensor{q_t.tensor(), scales_t.tensor()};
  }

  Matrix<cpu::E4m3> q, q_t;
  Matrix<float> scales, scales_t;
  const DeviceCopy<cpu::E4m3> q_gpu{q}, q_t_gpu{q_t};
  const DeviceCopy<float> scales_gpu{scales}, scales_t_gpu{scales_t};
};

void check_swiglu_both(int m, int n, bool interleaved, float limit, std::mt19937& rng) {
  std::normal_distribution<float> normal(0, 4);
  const auto random = [&](auto, auto) { return cpu::from_f32<cpu::Bf16>(normal(rng)); };
  Matrix<cpu::Bf16> x(m, 2 * n, 1), grad(m, n, 1);
  x.fill(random), grad.fill(random);
  const DeviceCopy<cpu::Bf16> x_gpu(x), grad_gpu(grad);
  QuantizedBoth activation(m, n), gradient(m, 2 * n);
  const SwigluOptions options{.interleaved = interleaved, .limit = limit, .weights = {}, .stream = {}};
  for (const bool gpu : {false, true}) {
    const Tensor in = gpu ? x_gpu.tensor() : x.tensor(), dh = gpu ? grad_gpu.tensor() : grad.tensor();
    swiglu_quantize_both(in, activation.rows(gpu), activation.transposed(gpu), options);
    swiglu_backward_both(in, dh, gradient.rows(gpu), gradient.transposed(gpu), options);
  }
  activation.expect_same_bytes();
  gradient.expect_same_bytes();
}

TEST_F(OnGpu, EverySwigluKernelGivesTheBytesOfTheCpu) {
  std::mt19937 rng(kSeed);
  for (const auto& [m, n] :
       {std::pair{1, 8}, {5, 304}, {13, 2056}, {2050, 264}, {2050, 2048}}) {  // by several rows at once, by pairs
    for (const bool interleaved : {false, true}) {
      for (const float limit : {std::numeric_limits<float>::infinity(), 3.0f}) {
        SCOPED_TRACE(::testing::Message() << m << "x" << n << " limit " << limit);
        check_swiglu<cpu::Bf16>(m, n, interleaved, limit, rng);
        check_swiglu<cpu::F16>(m, n, interleaved, limit, rng);
        check_swiglu<float>(m, n, interleaved, limit, rng);
        check_swiglu_both(m, n, interleaved, limit, rng);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(OnGpu, EveryQuantiseKernelGivesTheBytesOfTheCpu) {
  std::mt19937 rng(kSeed);
  for (const auto& [m, n] : {std::pair{1, 1}, {5, 300}, {130, 257}, {300, 128}}) {
    for (const bool blocks : {false, true}) {
      for (const bool pow2_scales : {false, true}) {
        SCOPED_TRACE(::testing::Message() << m << "x" << n << (blocks ? " by block" : " by row"));
        check_quantize<cpu::Bf16>(m, n, blocks, pow2_scales, rng);
        check_quantize<cpu::F16>(m, n, blocks, pow2_scales, rng);
        check_quantize<float>(m, n, blocks, pow2_scales, rng);
        if (HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace phalanx::test
