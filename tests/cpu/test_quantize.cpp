// Conversions against definitions and searches in FP64; quantisation against docs/numerics.md, to the byte.
#include <gtest/gtest.h>

#include <bit>
#include <cfenv>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/convert.h"
#include "cpu/cpu.h"
#include "phalanx/quantize.h"
#include "tests/cpu/matrix.h"

namespace phalanx::test {
namespace {

using cpu::Bf16;
using cpu::E4m3;
using cpu::F16;
using std::int64_t;

constexpr float kInf = std::numeric_limits<float>::infinity();

unsigned code_of(float x) { return cpu::from_f32<E4m3>(x).bits; }

// --- conversions -----------------------------------------------------------------------------------------------------

TEST(Convert, E4m3DecodesByDefinition) {
  for (unsigned code = 0; code < 256; ++code) {
    const double expected = e4m3_value(code);
    for (const float value : {cpu::kE4m3Values[code], cpu::to_f32(E4m3{static_cast<std::uint8_t>(code)})}) {
      if (std::isnan(expected)) {
        EXPECT_TRUE(std::isnan(value)) << code;
      } else {
        EXPECT_EQ(value, expected) << code;
        EXPECT_EQ(std::signbit(value), std::signbit(expected)) << code;
      }
    }
  }
}

TEST(Convert, EveryBf16ToE4m3) {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const float x = std::bit_cast<float>(bits << 16);
    ASSERT_EQ(code_of(x), nearest_e4m3(x)) << x;
    ASSERT_EQ(code_of(cpu::to_f32(Bf16{static_cast<std::uint16_t>(bits)})), nearest_e4m3(x)) << x;
  }
}

/// The value of an FP16 number, from the format's definition alone.
double f16_value(unsigned bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) magnitude = mantissa == 0 ? INFINITY : NAN;
  return bits & 0x8000 ? -magnitude : magnitude;
}

TEST(Convert, EveryF16ToF32AndE4m3) {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const float x = cpu::to_f32(F16{static_cast<std::uint16_t>(bits)});
    const double expected = f16_value(bits);
    ASSERT_EQ(code_of(x), nearest_e4m3(expected)) << expected;
    ASSERT_EQ(std::isnan(x), std::isnan(expected)) << bits;
    if (std::isnan(x)) continue;
    ASSERT_EQ(x, expected) << bits;
    ASSERT_EQ(std::signbit(x), std::signbit(expected)) << bits;
  }
}

TEST(Convert, E4m3RoundsAtEveryMidpoint) {
  for (unsigned code = 0; code < 0x7e; ++code) {
    const float middle = static_cast<float>((e4m3_value(code) + e4m3_value(code + 1)) / 2);
    for (const float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, kInf)}) {
      EXPECT_EQ(code_of(x), nearest_e4m3(x)) << x;
      EXPECT_EQ(code_of(-x), nearest_e4m3(-x)) << -x;
    }
  }
}

TEST(Convert, E4m3OfRandomFloats) {
  std::mt19937 rng(kSeed);
  for (int i = 0; i < 200000; ++i) {
    const float anything = std::bit_cast<float>(static_cast<std::uint32_t>(rng()));
    const float in_range =
        std::ldexp(std::uniform_real_distribution<float>(-1, 1)(rng), static_cast<int>(rng() % 24) - 13);
    for (const float x : {anything, in_range}) ASSERT_EQ(code_of(x), nearest_e4m3(x)) << x;
  }
}

TEST(Convert, E4m3Specials) {
  EXPECT_EQ(code_of(kInf), 0x7eu);
  EXPECT_EQ(code_of(-kInf), 0xfeu);
  EXPECT_EQ(code_of(FLT_MAX), 0x7eu);
  EXPECT_EQ(code_of(464.0f), 0x7eu);
  EXPECT_EQ(code_of(0.0f), 0x00u);
  EXPECT_EQ(code_of(-0.0f), 0x80u);
  EXPECT_EQ(code_of(-FLT_TRUE_MIN), 0x80u);
  EXPECT_EQ(code_of(NAN), 0x7fu);
  EXPECT_EQ(code_of(-NAN), 0x7fu);
  EXPECT_EQ(code_of(std::bit_cast<float>(0xff800001u)), 0x7fu);
}

// A sorted 16-bit format: the non-negative finite numbers are codes 0 .. last, and the next code would be worth
// `overflow`.
template <class T>
void expect_rounds_to_nearest(float x, const std::function<double(unsigned)>& value, unsigned last, double overflow) {
  const unsigned bits = cpu::from_f32<T>(x).bits;
  if (std::isnan(x)) {
    ASSERT_EQ(bits, 0x7fffu);
    return;
  }
  ASSERT_EQ(bits >> 15, std::signbit(x)) << x;
  // The codes around |x|, by bisection; infinity is the code after the last.
  const double magnitude = std::abs(static_cast<double>(x));
  unsigned low = 0, high = last + 1;
  while (high - low > 1) (value((low + high) / 2) <= magnitude ? low : high) = (low + high) / 2;
  const double below = magnitude - value(low), above = (high > last ? overflow : value(high)) - magnitude;
  const unsigned expected = below < above || (below == above && low % 2 == 0) ? low : high;
  ASSERT_EQ(bits & 0x7fff, expected) << x;
}

double bf16_value(unsigned bits) { return std::bit_cast<float>(bits << 16); }

TEST(Convert, F32ToBf16AndF16) {
  std::mt19937 rng(kSeed);
  const auto expect = [](float x) {
    expect_rounds_to_nearest<Bf16>(x, bf16_value, 0x7f7f, 0x1p128);
    expect_rounds_to_nearest<F16>(x, f16_value, 0x7bff, 65536);
  };
  for (int i = 0; i < 200000; ++i) {
    expect(std::bit_cast<float>(static_cast<std::uint32_t>(rng())));
    expect(std::ldexp(std::uniform_real_distribution<float>(-1, 1)(rng), static_cast<int>(rng() % 46) - 28));
  }
  for (unsigned bits = 0; bits < 0x7bff; ++bits) {
    const float middle = static_cast<float>((f16_value(bits) + f16_value(bits + 1)) / 2);
    for (const float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, kInf)}) expect(x), expect(-x);
  }
  for (unsigned bits = 0; bits < 0x7f80; ++bits) {
    const float middle = std::bit_cast<float>(bits << 16 | 0x8000u);
    for (const float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, kInf)}) expect(x), expect(-x);
  }
  for (const float x : {65504.0f, 65519.0f, 65520.0f, 65536.0f, kInf, -kInf, FLT_MAX, 0.0f, -0.0f}) expect(x);
}

// --- quantisation ----------------------------------------------------------------------------------------------------

int64_t blocks(int64_t x) { return (x + 127) / 128; }
int64_t block_rows(ScaleShape shape) { return shape == ScaleShape::row_1x128 ? 1 : 128; }

template <class T>
struct Quantized {
  Matrix<E4m3> data;
  Matrix<float> scales;

  Quantized(const Matrix<T>& x, ScaleShape shape, Order order, int64_t pad)
      : data(x.rows(), x.cols(), pad),
        scales((x.rows() + block_rows(shape) - 1) / block_rows(shape), blocks(x.cols()), pad, order) {}
  ScaledTensor tensor() { return {data.tensor(), scales.tensor()}; }
};

/// The four steps of docs/numerics.md, one element at a time.
template <class T>
void expect_quantized(const Matrix<T>& x, const Quantized<T>& q, ScaleShape shape, bool pow2) {
  const int64_t height = block_rows(shape);
  for (int64_t i0 = 0; i0 < x.rows(); i0 += height) {
    for (int64_t j0 = 0; j0 < x.cols(); j0 += 128) {
      const int64_t i1 = std::min(i0 + height, x.rows()), j1 = std::min(j0 + 128, x.cols());
      float amax = 0;
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j)
          if (std::isfinite(x.value(i, j))) amax = std::max(amax, static_cast<float>(std::abs(x.value(i, j))));
      volatile float scale = amax / 448.0f;
      if (scale < 0x1p-126f) scale = 0x1p-126f;
      if (pow2) {
        int exponent;
        const float fraction = std::frexp(scale, &exponent);
        scale = std::ldexp(1.0f, fraction == 0.5f ? exponent - 1 : exponent);
      }
      ASSERT_EQ(q.scales.at(i0 / height, j0 / 128), scale) << "scale of [" << i0 << ", " << j0 << "]";
      const volatile float inv = 1.0f / scale;
      for (int64_t i = i0; i < i1; ++i) {
        for (int64_t j = j0; j < j1; ++j) {
          const volatile float e = static_cast<float>(x.value(i, j)) * inv;
          ASSERT_EQ(q.data.at(i, j).bits, nearest_e4m3(e)) << "at [" << i << ", " << j << "], x = " << x.value(i, j);
        }
      }
    }
  }
}

template <class T>
void quantize_and_expect(Matrix<T>& x, ScaleShape shape, bool pow2, Order order = Order::row_major, int64_t pad = 0) {
  SCOPED_TRACE(testing::Message() << x.rows() << " x " << x.cols() << " shape " << static_cast<int>(shape) << " pow2 "
                                  << pow2);
  Quantized<T> q(x, shape, order, pad);
  const QuantizeOptions options{.pow2_scales = pow2};
  shape == ScaleShape::row_1x128 ? quantize_rows(x.tensor(), q.tensor(), options)
                                 : quantize_blocks(x.tensor(), q.tensor(), options);
  q.data.expect_frame_intact();
  q.scales.expect_frame_intact();
  expect_quantized(x, q, shape, pow2);
}

constexpr ScaleShape kShapes[] = {ScaleShape::row_1x128, ScaleShape::block_128x128};

template <class T>
class Quantize : public testing::Test {
 protected:
  // Rows of very different magnitudes, some zeros.
  static Matrix<T> random(int64_t rows, int64_t cols, int64_t pad, std::mt19937& rng) {
    Matrix<T> x(rows, cols, pad);
    std::vector<float> magnitude(rows);
    for (float& m : magnitude) m = std::exp2(std::uniform_real_distribution<float>(-12, 12)(rng));
    return x.fill([&](int64_t i, int64_t) {
      return cpu::from_f32<T>(rng() % 16 == 0 ? 0.0f : magnitude[i] * std::normal_distribution<float>()(rng));
    });
  }
};
using FloatTypes = testing::Types<float, Bf16, F16>;
TYPED_TEST_SUITE(Quantize, FloatTypes);

TYPED_TEST(Quantize, ShapesAndStrides) {
  std::mt19937 rng(kSeed);
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  const int64_t sizes[][2] = {{0, 128}, {1, 1}, {1, 128}, {3, 127}, {2, 129}, {128, 128}, {129, 257}, {300, 640}};
  for (const auto& [rows, cols] : sizes) {
    for (const ScaleShape shape : kShapes) {
      for (const Order order : {Order::row_major, Order::col_major}) {
        auto x = this->random(rows, cols, rng() % 3, rng);
        quantize_and_expect(x, shape, rng() % 2, order, rng() % 3);
      }
    }
  }
}

TYPED_TEST(Quantize, SpecialBlocks) {
  using T = TypeParam;
  std::mt19937 rng(kSeed);
  const float smallest = cpu::to_f32([] {
    T x{};
    if constexpr (std::is_same_v<T, float>)
      x = FLT_TRUE_MIN;
    else
      x.bits = 1;
    return x;
  }());
  const float largest = std::is_same_v<T, F16> ? 65504.0f : std::is_same_v<T, Bf16> ? 0x1.fep127f : FLT_MAX;
  // One value in each of the first four places of a row, then nothing but the last.
  const float rows[][4] = {{0, -0.0f, 0, -0.0f},
                           {smallest, -smallest, 0, 3 * smallest},
                           {NAN, 1, -2, 3},
                           {kInf, 1, -kInf, -3},
                           {NAN, kInf, -kInf, NAN},
                           {NAN, NAN, NAN, NAN},
                           {largest, -largest, 1, kInf},
                           {448, -448, 1e-3f, 0},
                           {449, 0x1p-9f, 0x1p-10f, 0},
                           {0x1p-14f, 0x1p-20f, -0x1p-24f, 0}};
  for (const auto& row : rows) {
    for (const ScaleShape shape : kShapes) {
      for (const bool pow2 : {false, true}) {
        Matrix<T> x(3, 200);
        x.fill([&](int64_t, int64_t j) { return cpu::from_f32<T>(row[std::min<int64_t>(j, 3)]); });
        quantize_and_expect(x, shape, pow2);
      }
    }
  }
}

TEST(QuantizeValues, DocumentedTable) {
  Matrix<float> x(4, 4);
  const float values[4][4] = {
      {0, -0.0f, 0, 0}, {NAN, kInf, -kInf, 448}, {NAN, kInf, -kInf, -NAN}, {0x1p-127f, -0x1p-126f, 0, 0}};
  x.fill([&](int64_t i, int64_t j) { return values[i][j]; });
  Quantized<float> q(x, ScaleShape::row_1x128, Order::row_major, 0);
  quantize_rows(x.tensor(), q.tensor());
  const float scales[] = {0x1p-126f, 1.0f, 0x1p-126f, 0x1p-126f};
  const unsigned codes[4][4] = {
      {0, 0x80, 0, 0}, {0x7f, 0x7e, 0xfe, 0x7e}, {0x7f, 0x7e, 0xfe, 0x7f}, {0x30, 0xb8, 0, 0}};
  for (int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(q.scales.at(i, 0), scales[i]) << i;
    for (int64_t j = 0; j < 4; ++j) EXPECT_EQ(q.data.at(i, j).bits, codes[i][j]) << i << ", " << j;
  }
}

TEST(QuantizeValues, IgnoresTheCallersRoundingMode) {
  std::mt19937 rng(kSeed);
  Matrix<float> x(5, 300);
  x.fill([&](int64_t, int64_t) { return std::normal_distribution<float>()(rng); });
  for (const ScaleShape shape : kShapes) {
    Quantized<float> q(x, shape, Order::row_major, 0);
    std::fesetround(FE_UPWARD);
    cpu::quantize(x.tensor(), q.tensor(), shape, false);
    const int mode = std::fegetround();
    std::fesetround(FE_TONEAREST);
    EXPECT_EQ(mode, FE_UPWARD) << "the caller's rounding mode was not restored";
    expect_quantized(x, q, shape, false);
  }
}

#ifdef __SSE__
TEST(QuantizeValues, IgnoresFlushToZero) {
  Matrix<float> x(1, 2);
  x.at(0, 0) = 0x1p-127f;  // subnormal
  x.at(0, 1) = 0;
  Quantized<float> q(x, ScaleShape::row_1x128, Order::row_major, 0);
  const unsigned saved = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(saved | 0x8040);  // FTZ and DAZ
  cpu::quantize(x.tensor(), q.tensor(), ScaleShape::row_1x128, false);
  __builtin_ia32_ldmxcsr(saved);
  EXPECT_EQ(q.data.at(0, 0).bits, 0x30u);
}
#endif

// --- dequantisation --------------------------------------------------------------------------------------------------

TYPED_TEST(Quantize, RoundTripStaysWithinHalfAStep) {
  std::mt19937 rng(kSeed);
  for (const ScaleShape shape : kShapes) {
    const auto x = this->random(140, 300, 1, rng);
    auto in = x;
    Quantized<TypeParam> q(x, shape, Order::col_major, 1);
    cpu::quantize(in.tensor(), q.tensor(), shape, false);
    Matrix<float> y(x.rows(), x.cols(), 2);
    dequantize(q.tensor(), y.tensor());
    y.expect_frame_intact();
    for (int64_t i = 0; i < x.rows(); ++i) {
      for (int64_t j = 0; j < x.cols(); ++j) {
        const double scale = q.scales.value(i / block_rows(shape), j / 128);
        const double bound = std::max(std::abs(x.value(i, j)) * 0x1p-4, scale * 0x1p-10) * (1 + 0x1p-18);
        ASSERT_LE(std::abs(y.value(i, j) - x.value(i, j)), bound) << i << ", " << j;
      }
    }
  }
}

TYPED_TEST(Quantize, DequantizeRoundsTheProductOnce) {
  using T = TypeParam;
  std::mt19937 rng(kSeed);
  for (const ScaleShape shape : kShapes) {
    Matrix<T> x(130, 256);
    Quantized<T> q(x, shape, Order::row_major, 1);
    q.data.fill([&](int64_t i, int64_t j) { return E4m3{static_cast<std::uint8_t>(i * 256 + j)}; });
    q.scales.fill([&](int64_t, int64_t) { return std::exp2(std::uniform_real_distribution<float>(-30, 12)(rng)); });
    dequantize(q.tensor(), x.tensor());
    x.expect_frame_intact();
    for (int64_t i = 0; i < x.rows(); ++i) {
      for (int64_t j = 0; j < x.cols(); ++j) {
        const volatile float product =
            static_cast<float>(e4m3_value(q.data.at(i, j).bits)) * q.scales.at(i / block_rows(shape), j / 128);
        const T expected = cpu::from_f32<T>(product);
        ASSERT_EQ(0, std::memcmp(&x.at(i, j), &expected, sizeof(T))) << i << ", " << j;
      }
    }
  }
}

}  // namespace
}  // namespace phalanx::test
