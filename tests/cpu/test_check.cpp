// Every wrong argument gets an error of the right kind whose message names the argument, what it is and what was
// expected, before anything is written.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ops/check.h"
#include "ops/check_quantize.h"
#include "phalanx/gemm.h"
#include "phalanx/quantize.h"
#include "tests/cpu/matrix.h"
#include "tests/testing.h"

namespace phalanx::test {
namespace {

using cpu::Bf16;
using cpu::E4m3;
using Words = std::vector<std::string>;

/// A right call of every operation, for tests to spoil.
class Check : public testing::Test {
 protected:
  Matrix<E4m3> a_{64, 256, 1}, b_{130, 256};
  Matrix<float> sfa_{64, 2, 0, Order::col_major}, sfb_{2, 2};
  Matrix<Bf16> d_{64, 130}, c_{64, 130};
  ScaledTensor a{a_.tensor(), sfa_.tensor()}, b{b_.tensor(), sfb_.tensor()};
  Tensor d = d_.tensor();
  GemmOptions options;

  Matrix<float> x_{64, 256, 1};
  Tensor x = x_.tensor();
  ScaledTensor q{a_.tensor(), sfa_.tensor()};

  void expect_gemm_error(ErrorCode code, const Words& words) {
    expect_error(code, words, [&] { check_gemm_fp8(a, b, d, options); });
    // The public call throws the same, and has written nothing.
    const Matrix<Bf16> before = d_;
    expect_error(code, words, [&] { gemm_fp8(a, b, d, options); });
    EXPECT_TRUE(d_.same_bytes(before));
  }

  void expect_quantize_error(ErrorCode code, const Words& words) {
    const auto data = a_;
    const auto scales = sfa_;
    expect_error(code, words, [&] { quantize_rows(x, q); });
    EXPECT_TRUE(a_.same_bytes(data) && sfa_.same_bytes(scales));
  }

  void expect_dequantize_error(ErrorCode code, const Words& words) {
    const auto before = x_;
    expect_error(code, words, [&] { dequantize(q, x); });
    EXPECT_TRUE(x_.same_bytes(before));
  }

  void move_to_cuda(int index) {
    for (Tensor* t : {&a.data, &a.scales, &b.data, &b.scales, &d}) t->device = {DeviceType::cuda, index};
  }
};

constexpr auto kInvalid = ErrorCode::invalid_argument;
constexpr auto kInvalidDtype = ErrorCode::invalid_dtype;
constexpr auto kInvalidDevice = ErrorCode::invalid_device;

TEST_F(Check, AcceptsWhatIsRight) {
  EXPECT_NO_THROW(check_gemm_fp8(a, b, d, options));
  options.c = c_.tensor();
  EXPECT_NO_THROW(check_gemm_fp8(a, b, d, options));
  options.c = d;
  EXPECT_NO_THROW(check_gemm_fp8(a, b, d, options));
  move_to_cuda(3);
  options.c = d;
  EXPECT_NO_THROW(check_gemm_fp8(a, b, d, options));
  EXPECT_NO_THROW(check_quantize(QuantizeForm::rows, x, &q, nullptr));
  EXPECT_EQ(check_dequantize(q, x), ScaleShape::row_1x128);
}

// --- gemm_fp8 --------------------------------------------------------------------------------------------------------

TEST_F(Check, GemmDtypes) {
  a.data.dtype = DType::f16;
  expect_gemm_error(kInvalidDtype, {"gemm_fp8", "a.data", "f16 [64, 256]", "expected dtype e4m3"});
  a.data.dtype = DType::e4m3;
  b.scales.dtype = DType::bf16;
  expect_gemm_error(kInvalidDtype, {"b.scales", "bf16 [2, 2]", "expected dtype f32"});
  b.scales.dtype = DType::f32;
  d.dtype = DType::f16;
  expect_gemm_error(kInvalidDtype, {"d is f16", "expected dtype bf16 or f32"});
  d.dtype = DType::bf16;
  options.c = c_.tensor();
  options.c->dtype = DType::f32;
  expect_gemm_error(kInvalidDtype, {"options.c", "f32", "expected dtype bf16"});
}

TEST_F(Check, GemmShapes) {
  b.data.shape[1] = 128;
  expect_gemm_error(kInvalid, {"b.data", "[130, 128]", "[130, 256]", "[N, K]"});
  b.data.shape[1] = 256;
  a.scales.shape[1] = 3;
  expect_gemm_error(kInvalid, {"a.scales", "[64, 3]", "[64, 2]", "[M, ceil(K / 128)]"});
  a.scales.shape[1] = 2;
  b.scales.shape[0] = 1;
  expect_gemm_error(kInvalid, {"b.scales", "[1, 2]", "[2, 2]", "[ceil(N / 128), ceil(K / 128)]"});
  b.scales.shape[0] = 2;
  d.shape[0] = 63;
  expect_gemm_error(kInvalid, {"d is", "[63, 130]", "[64, 130]", "[M, N]"});
  d.shape[0] = 64;
  options.c = c_.tensor();
  options.c->shape[1] = 129;
  expect_gemm_error(kInvalid, {"options.c", "[64, 129]", "[64, 130]"});
}

TEST_F(Check, GemmRank) {
  a.data.ndim = 3;
  expect_gemm_error(kInvalid, {"a.data", "3 dimensions", "expected 2"});
  a.data.ndim = -1;
  expect_gemm_error(kInvalid, {"a.data", "-1 dimensions"});
  a.data.ndim = 1000;
  expect_gemm_error(kInvalid, {"a.data", "1000 dimensions"});
}

TEST_F(Check, GemmEmptyNAndK) {
  b.data.shape[0] = 0;
  expect_gemm_error(kInvalid, {"b.data", "N is 0", "at least 1"});
  a.data.shape[1] = 0;
  expect_gemm_error(kInvalid, {"a.data", "K is 0", "at least 1"});
}

TEST_F(Check, GemmDimensionsBeyondInt32) {
  a.data.shape[0] = a.scales.shape[0] = d.shape[0] = 1ll << 31;
  expect_gemm_error(kInvalid, {"a.data", "2147483648", "2147418112"});
  a.data.shape[0] = -1;
  expect_gemm_error(kInvalid, {"a.data", "-1", "out of range"});
}

TEST_F(Check, GemmColumnStrides) {
  a.data.strides = {1, 64};
  expect_gemm_error(kInvalid, {"a.data", "column stride is 64", "expected 1"});
}

TEST_F(Check, GemmRowStrideRule) {
  a.data.strides[0] = 264;
  expect_gemm_error(kInvalid, {"a.data", "row stride is 264 bytes", "multiple of 16"});
  a.data.strides[0] = 272;
  d.strides[0] = 132;
  expect_gemm_error(kInvalid, {"d is", "row stride is 264 bytes", "multiple of 16"});
  d.strides[0] = 128;
  expect_gemm_error(kInvalid, {"d is", "row stride is 128 elements", "130 columns"});
  d.strides[0] = 136;
  b.data.strides[0] = 1ll << 40;
  expect_gemm_error(kInvalid, {"b.data", "1099511627776", "2^40"});
  b.data.strides[0] = 256;
  options.c = c_.tensor();
  options.c->strides[0] = 0;
  expect_gemm_error(kInvalid, {"options.c", "row stride is 0"});
}

TEST_F(Check, GemmBaseAlignment) {
  b.data.data = static_cast<char*>(b.data.data) + 8;
  expect_gemm_error(kInvalid, {"b.data", "data pointer is 0x", "multiple of 16"});
  b.data.data = b_.tensor().data;
  a.scales.data = static_cast<char*>(a.scales.data) + 2;
  expect_gemm_error(kInvalid, {"a.scales", "data pointer is 0x", "multiple of 4"});
}

TEST_F(Check, GemmNull) {
  const std::pair<Tensor*, const char*> tensors[] = {
      {&a.data, "a.data"}, {&a.scales, "a.scales"}, {&b.data, "b.data"}, {&b.scales, "b.scales"}, {&d, "d is"}};
  for (const auto& [tensor, name] : tensors) {
    void* const data = std::exchange(tensor->data, nullptr);
    expect_gemm_error(kInvalid, {name, "null"});
    tensor->data = data;
  }
  options.c = c_.tensor();
  options.c->data = nullptr;
  expect_gemm_error(kInvalid, {"options.c", "null"});
}

TEST_F(Check, GemmDevices) {
  b.scales.device = {DeviceType::cuda, 0};
  expect_gemm_error(kInvalidDevice, {"b.scales", "cuda:0", "device of a.data, cpu"});
  b.scales.device = {};
  options.c = c_.tensor();
  options.c->device = {DeviceType::cuda, 1};
  expect_gemm_error(kInvalidDevice, {"options.c", "cuda:1", "device of a.data"});
  options.c.reset();
  move_to_cuda(0);
  d.device.index = 1;
  expect_gemm_error(kInvalidDevice, {"d is", "cuda:1", "device of a.data, cuda:0"});
  move_to_cuda(-1);
  expect_gemm_error(kInvalidDevice, {"a.data", "cuda:-1", "negative"});
}

TEST_F(Check, GemmOverlap) {
  d.data = static_cast<char*>(a.data.data) + 16;
  expect_gemm_error(kInvalid, {"d is", "overlaps", "a.data"});
  d.data = b.scales.data;
  expect_gemm_error(kInvalid, {"d is", "overlaps", "b.scales"});
  d.data = d_.tensor().data;
  options.c = d;
  options.c->data = static_cast<char*>(d.data) + 16;
  expect_gemm_error(kInvalid, {"d is", "overlaps", "options.c"});
  options.c->data = d.data;
  options.c->strides[0] += 8;
  expect_gemm_error(kInvalid, {"d is", "overlaps", "options.c"});
}

TEST_F(Check, GemmColumnsOfOneMatrixAreDisjoint) {
  Matrix<Bf16> wide(64, 272);
  d = wide.tensor();
  d.shape[1] = 130;
  options.c = d;
  options.c->data = static_cast<Bf16*>(d.data) + 136;
  EXPECT_NO_THROW(check_gemm_fp8(a, b, d, options));
  options.c->data = static_cast<Bf16*>(d.data) + 128;
  expect_gemm_error(kInvalid, {"d is", "overlaps", "options.c"});
}

TEST_F(Check, GemmStridesBeyondTheAddressSpace) {
  a.scales.strides = {1ll << 62, 1};
  expect_gemm_error(kInvalid, {"a.scales", "4611686018427387904", "address space"});
}

TEST_F(Check, GemmNumSms) {
  options.num_sms = -2;
  expect_gemm_error(kInvalid, {"options.num_sms", "-2"});
}

TEST_F(Check, GemmIgnoresStridesThatMeanNothing) {
  // One row: arrays from other libraries carry any stride there.
  for (Tensor* t : {&a.data, &a.scales, &d}) t->shape[0] = 1, t->strides[0] = 7;
  EXPECT_NO_THROW(check_gemm_fp8(a, b, d, options));
  EXPECT_EQ(row_stride(a.data), 256);
  EXPECT_EQ(row_stride(d), 136);
  // No row: not even memory.
  for (Tensor* t : {&a.data, &a.scales, &d}) t->shape[0] = 0, t->data = nullptr;
  EXPECT_NO_THROW(check_gemm_fp8(a, b, d, options));
  EXPECT_NO_THROW(gemm_fp8(a, b, d, options));
}

// --- quantize, dequantize --------------------------------------------------------------------------------------------

TEST_F(Check, QuantizeDtypes) {
  x.dtype = DType::e4m3;
  expect_quantize_error(kInvalidDtype, {"quantize_rows", "x is e4m3", "bf16 or f16 or f32"});
  x.dtype = DType::f32;
  q.data.dtype = DType::bf16;
  expect_quantize_error(kInvalidDtype, {"q.data", "bf16", "expected dtype e4m3"});
  q.data.dtype = DType::e4m3;
  q.scales.dtype = DType::f16;
  expect_quantize_error(kInvalidDtype, {"q.scales", "f16", "expected dtype f32"});
}

TEST_F(Check, QuantizeShapes) {
  q.data.shape[1] = 255;
  expect_quantize_error(kInvalid, {"q.data", "[64, 255]", "[64, 256]", "shape of x"});
  q.data.shape[1] = 256;
  q.scales.shape[0] = 1;
  expect_quantize_error(kInvalid, {"q.scales", "[1, 2]", "[64, 2]", "1 x 128"});
  q.scales.shape[0] = 64;
  expect_error(kInvalid, {"quantize_blocks", "q.scales", "[64, 2]", "[1, 2]", "128 x 128"},
               [&] { quantize_blocks(x, q); });
}

TEST_F(Check, QuantizeStridesAndMemory) {
  x.strides[1] = 2;
  expect_quantize_error(kInvalid, {"x is", "column stride is 2"});
  x.strides[1] = 1;
  q.data.strides[0] = 255;
  expect_quantize_error(kInvalid, {"q.data", "row stride is 255", "256 columns"});
  q.data.strides[0] = 272;
  q.scales.strides = {1, 63};
  expect_quantize_error(kInvalid, {"q.scales", "strides [1, 63]", "overlap"});
  q.scales.strides = {0, 64};
  expect_quantize_error(kInvalid, {"q.scales", "overlap"});
  q.scales.strides = {1, 64};
  x.data = static_cast<char*>(x.data) + 2;
  expect_quantize_error(kInvalid, {"x is", "data pointer is 0x", "multiple of 4"});
  x.data = nullptr;
  expect_quantize_error(kInvalid, {"x is", "null"});
}

TEST_F(Check, QuantizeInputMayRepeatRows) {
  x.strides[0] = 0;
  EXPECT_NO_THROW(check_quantize(QuantizeForm::rows, x, &q, nullptr));
}

TEST_F(Check, QuantizeDevicesAndOverlap) {
  q.data.device = {DeviceType::cuda, 0};
  expect_quantize_error(kInvalidDevice, {"q.data", "cuda:0", "device of x, cpu"});
  q.data.device = {};
  q.data.data = x.data;
  expect_quantize_error(kInvalid, {"q.data", "overlaps", "x"});
  q.data = a_.tensor();
  q.scales.data = q.data.data;
  expect_quantize_error(kInvalid, {"q.scales", "overlaps", "q.data"});
}

TEST_F(Check, DequantizeTellsBlocksByTheScales) {
  Matrix<float> scales(1, 2);
  q.scales = scales.tensor();
  EXPECT_EQ(check_dequantize(q, x), ScaleShape::block_128x128);
  q.scales.shape[0] = 2;
  expect_dequantize_error(kInvalid, {"dequantize", "q.scales", "[2, 2]", "[64, 2]", "[1, 2]"});
}

TEST_F(Check, DequantizeErrors) {
  x.dtype = DType::e4m3;
  expect_dequantize_error(kInvalidDtype, {"x is e4m3", "bf16 or f16 or f32"});
  x.dtype = DType::f32;
  x.shape[0] = 65;
  expect_dequantize_error(kInvalid, {"x is", "[65, 256]", "[64, 256]"});
  x.shape[0] = 64;
  x.strides[0] = 4;
  expect_dequantize_error(kInvalid, {"x is", "row stride is 4"});
  x = x_.tensor();
  x.data = q.scales.data;
  expect_dequantize_error(kInvalid, {"x is", "overlaps", "q.scales"});
  x = x_.tensor();
  x.device = {DeviceType::cuda, 2};
  expect_dequantize_error(kInvalidDevice, {"x is", "cuda:2", "device of q.data"});
}

TEST(ToString, NamesATensor) {
  EXPECT_EQ(to_string(row_major(nullptr, DType::bf16, 64, 7168, {DeviceType::cuda, 0})),
            "bf16 [64, 7168], strides [7168, 1], cuda:0");
  EXPECT_EQ(to_string(col_major(nullptr, DType::f32, 3, 2)), "f32 [3, 2], strides [1, 3], cpu");
  EXPECT_STREQ(name_of(DType::e4m3), "e4m3");
}

}  // namespace
}  // namespace phalanx::test
