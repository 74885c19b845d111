// The CPU product against FP64, within the bound that docs/numerics.md derives.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <ostream>
#include <random>
#include <thread>
#include <vector>

#include "cpu/cpu.h"
#include "phalanx/gemm.h"
#include "tests/cpu/matrix.h"

namespace phalanx::test {
namespace {

using cpu::Bf16;
using cpu::E4m3;
using std::int64_t;

enum class WithC { none, separate, in_place };

struct Case {
  int64_t m, n, k;
  int64_t pad = 0;  // of rows, in units of 16 bytes
  WithC c = WithC::none;
  Order sfa_order = Order::col_major;

  friend std::ostream& operator<<(std::ostream& os, const Case& t) {
    return os << "m" << t.m << " n" << t.n << " k" << t.k << " pad" << t.pad << " c" << static_cast<int>(t.c) << " sfa"
              << static_cast<int>(t.sfa_order);
  }
};

int64_t blocks(int64_t x) { return (x + 127) / 128; }

struct Operands {
  Matrix<E4m3> a, b;
  Matrix<float> sfa, sfb;

  explicit Operands(const Case& t)
      : a(t.m, t.k, t.pad),
        b(t.n, t.k, 2 * t.pad),
        sfa(t.m, blocks(t.k), t.pad, t.sfa_order),
        sfb(blocks(t.n), blocks(t.k), t.pad) {}

  void randomize(std::mt19937& rng) {
    const auto code = [&](int64_t, int64_t) { return E4m3{static_cast<std::uint8_t>(rng() % 0x7f | (rng() & 0x80))}; };
    const auto scale = [&](int64_t, int64_t) { return std::exp2(std::uniform_real_distribution<float>(-6, 6)(rng)); };
    a.fill(code), b.fill(code), sfa.fill(scale), sfb.fill(scale);
  }

  ScaledTensor a_tensor() { return {a.tensor(), sfa.tensor()}; }
  ScaledTensor b_tensor() { return {b.tensor(), sfb.tensor()}; }
};

/// What one element of D should be, and S, the scale of its error.
struct Element {
  double value, s;
};

/// All of D. Operands are decoded once, as each of their elements is in many sums.
class Reference {
 public:
  explicit Reference(const Operands& x)
      : x_(x), a_(values(x.a)), b_(values(x.b)), a_magnitudes_(magnitudes(a_)), b_magnitudes_(magnitudes(b_)) {}

  Element at(int64_t i, int64_t j) const {
    const int64_t k = x_.a.cols();
    Element element{0, 0};
    for (int64_t block = 0; block < blocks(k); ++block) {
      const double scale = x_.sfa.value(i, block) * x_.sfb.value(j / 128, block);
      double value = 0, s = 0;
      for (int64_t l = block * 128; l < std::min(k, block * 128 + 128); ++l) {
        value += a_[i * k + l] * b_[j * k + l];
        s += a_magnitudes_[i * k + l] * b_magnitudes_[j * k + l];
      }
      element.value += scale * value;
      element.s += std::abs(scale) * s;
    }
    return element;
  }

 private:
  static std::vector<double> values(const Matrix<E4m3>& matrix) {
    std::vector<double> all;
    for (int64_t i = 0; i < matrix.rows(); ++i)
      for (int64_t j = 0; j < matrix.cols(); ++j) all.push_back(matrix.value(i, j));
    return all;
  }
  static std::vector<double> magnitudes(std::vector<double> values) {
    for (double& v : values) v = v == 0 ? 0 : std::max(std::abs(v), 0x1p-6);
    return values;
  }

  const Operands& x_;
  std::vector<double> a_, b_, a_magnitudes_, b_magnitudes_;
};

double error_bound(const Element& r, int64_t k, bool with_c, bool bf16) {
  const double nb = static_cast<double>(blocks(k));
  const double acc = 1.01 * (129 + nb + 2) * 0x1p-24 * r.s;
  const double c = with_c ? 0x1p-24 * (std::abs(r.value) + acc) : 0;
  const double out = bf16 ? 0x1p-8 * (std::abs(r.value) + acc + c) : 0;
  return acc + c + out + nb * 0x1p-100;
}

template <class T>
class Gemm : public testing::Test {};
using OutTypes = testing::Types<float, Bf16>;
TYPED_TEST_SUITE(Gemm, OutTypes);

template <class T>
void expect_within_bound(const Case& t, std::mt19937& rng) {
  SCOPED_TRACE(testing::Message() << t);
  Operands x(t);
  x.randomize(rng);
  Matrix<T> c(t.m, t.n, t.pad), d(t.m, t.n, 3 * t.pad);
  const auto make_c = [&](int64_t, int64_t) { return cpu::from_f32<T>(std::normal_distribution<float>(0, 1e5f)(rng)); };
  Matrix<T>& in = t.c == WithC::in_place ? d : c;
  if (t.c != WithC::none) in.fill(make_c);
  const Matrix<T> addend = in;
  const Tensor c_tensor = in.tensor();

  cpu::gemm_fp8(x.a_tensor(), x.b_tensor(), d.tensor(), t.c == WithC::none ? nullptr : &c_tensor);

  d.expect_frame_intact();
  if (t.c == WithC::separate) {
    EXPECT_TRUE(c.same_bytes(addend)) << "C was written";
  }
  const Reference reference(x);
  for (int64_t i = 0; i < t.m; ++i) {
    for (int64_t j = 0; j < t.n; ++j) {
      Element r = reference.at(i, j);
      if (t.c != WithC::none) r.value += addend.value(i, j);
      const double bound = error_bound(r, t.k, t.c != WithC::none, std::is_same_v<T, Bf16>);
      ASSERT_LE(std::abs(d.value(i, j) - r.value), bound)
          << "at [" << i << ", " << j << "], expected " << r.value << ", got " << d.value(i, j);
    }
  }
}

TYPED_TEST(Gemm, EdgesOfShapes) {
  std::mt19937 rng(kSeed);
  // The last two have tiles of the largest width and height.
  for (const Case& t :
       {Case{0, 128, 128}, Case{1, 1, 1}, Case{1, 1, 4096}, Case{1, 1000, 300, 1}, Case{2, 576, 200},
        Case{3, 127, 127, 1}, Case{5, 129, 129}, Case{64, 257, 384, 2}, Case{65, 128, 16}, Case{128, 128, 128},
        Case{255, 130, 640, 1}, Case{257, 513, 257}, Case{520, 1, 130}, Case{5, 8200, 260, 1}, Case{4100, 300, 40}}) {
    expect_within_bound<TypeParam>(t, rng);
  }
}

TYPED_TEST(Gemm, RandomShapes) {
  std::mt19937 rng(kSeed);
  SCOPED_TRACE(testing::Message() << "seed " << kSeed);
  const auto between = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(rng);
  };
  for (int i = 0; i < 30; ++i) {
    expect_within_bound<TypeParam>({between(1, 200), between(1, 400), between(1, 700), between(0, 3),
                                    static_cast<WithC>(between(0, 2)), static_cast<Order>(between(0, 1))},
                                   rng);
  }
}

TYPED_TEST(Gemm, AddsC) {
  std::mt19937 rng(kSeed);
  for (const WithC c : {WithC::separate, WithC::in_place}) expect_within_bound<TypeParam>({70, 300, 260, 1, c}, rng);
}

// Small integers and powers of two: no step rounds but the last, so nothing lost or doubled can hide.
TYPED_TEST(Gemm, ExactInputsGiveExactBits) {
  std::mt19937 rng(kSeed);
  const Case t{67, 300, 8000, 1, WithC::none, Order::row_major};
  Operands x(t);
  const auto integer = [&](int64_t, int64_t) {
    return cpu::from_f32<E4m3>(static_cast<float>(std::uniform_int_distribution<int>(-8, 8)(rng)));
  };
  const auto power = [&](int64_t, int64_t) { return std::exp2(static_cast<float>(rng() % 3)); };
  x.a.fill(integer), x.b.fill(integer), x.sfa.fill(power), x.sfb.fill(power);
  Matrix<TypeParam> d(t.m, t.n);
  cpu::gemm_fp8(x.a_tensor(), x.b_tensor(), d.tensor(), nullptr);
  const Reference reference(x);
  for (int64_t i = 0; i < t.m; ++i) {
    for (int64_t j = 0; j < t.n; ++j) {
      const auto expected = cpu::from_f32<TypeParam>(static_cast<float>(reference.at(i, j).value));
      ASSERT_EQ(d.value(i, j), cpu::to_f32(expected)) << "at [" << i << ", " << j << "]";
    }
  }
}

TEST(CpuGemm, MultipliesEveryPairOfCodes) {
  Operands x({256, 256, 1});
  const auto code = [](int64_t i, int64_t) { return E4m3{static_cast<std::uint8_t>(i)}; };
  const auto one = [](int64_t, int64_t) { return 1.0f; };
  x.a.fill(code), x.b.fill(code), x.sfa.fill(one), x.sfb.fill(one);
  Matrix<float> d(256, 256);
  cpu::gemm_fp8(x.a_tensor(), x.b_tensor(), d.tensor(), nullptr);
  for (unsigned i = 0; i < 256; ++i) {
    for (unsigned j = 0; j < 256; ++j) {
      const double expected = e4m3_value(i) * e4m3_value(j);
      if (std::isnan(expected))
        ASSERT_TRUE(std::isnan(d.value(i, j))) << i << " * " << j;
      else
        ASSERT_EQ(d.value(i, j), expected) << i << " * " << j;
    }
  }
}

TEST(CpuGemm, NanSpoilsItsRowAndColumnOnly) {
  std::mt19937 rng(kSeed);
  for (const int64_t m : {1, 9}) {
    Operands x({m, 140, 300});
    x.randomize(rng);
    const int64_t row = m - 1;
    x.a.at(row, 299) = {0xff};
    x.b.at(130, 0) = {0x7f};
    Matrix<Bf16> d(m, 140);
    cpu::gemm_fp8(x.a_tensor(), x.b_tensor(), d.tensor(), nullptr);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < 140; ++j) ASSERT_EQ(std::isnan(d.value(i, j)), i == row || j == 130) << i << ", " << j;
  }
}

TEST(CpuGemm, NanInScalesAndCPropagates) {
  std::mt19937 rng(kSeed);
  Operands x({4, 260, 300});
  x.randomize(rng);
  x.sfa.at(1, 2) = NAN;
  x.sfb.at(2, 0) = NAN;
  Matrix<float> c(4, 260), d(4, 260);
  c.fill([](int64_t i, int64_t j) { return i == 3 && j == 5 ? NAN : 1.0f; });
  const Tensor c_tensor = c.tensor();
  cpu::gemm_fp8(x.a_tensor(), x.b_tensor(), d.tensor(), &c_tensor);
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < 260; ++j)
      ASSERT_EQ(std::isnan(d.value(i, j)), i == 1 || j >= 256 || (i == 3 && j == 5)) << i << ", " << j;
}

class NumThreads {
 public:
  explicit NumThreads(int count) { setenv("PHALANX_NUM_THREADS", std::to_string(count).c_str(), 1); }
  ~NumThreads() { unsetenv("PHALANX_NUM_THREADS"); }
};

TEST(CpuGemm, SameBitsWhateverTheThreads) {
  std::mt19937 rng(kSeed);
  const Case t{300, 700, 1000};
  Operands x(t);
  x.randomize(rng);
  const ScaledTensor a = x.a_tensor(), b = x.b_tensor();
  Matrix<float> expected(t.m, t.n);
  {
    NumThreads one(1);
    cpu::gemm_fp8(a, b, expected.tensor(), nullptr);
  }
  for (const int count : {2, 3, 16}) {
    NumThreads many(count);
    Matrix<float> d(t.m, t.n);
    cpu::gemm_fp8(a, b, d.tensor(), nullptr);
    EXPECT_TRUE(d.same_bytes(expected)) << count << " threads";
  }
}

TEST(CpuGemm, ManyCallersAtOnce) {
  std::mt19937 rng(kSeed);
  const Case t{33, 300, 500};
  Operands x(t);
  x.randomize(rng);
  const ScaledTensor a = x.a_tensor(), b = x.b_tensor();
  Matrix<Bf16> expected(t.m, t.n);
  cpu::gemm_fp8(a, b, expected.tensor(), nullptr);
  // More than the BLAS has buffers for.
  std::vector<Matrix<Bf16>> results(200, Matrix<Bf16>(t.m, t.n));
  {
    std::vector<std::jthread> callers;
    for (auto& d : results) callers.emplace_back([&a, &b, &d] { cpu::gemm_fp8(a, b, d.tensor(), nullptr); });
  }
  for (const auto& d : results) EXPECT_TRUE(d.same_bytes(expected));
}

// What other threads held when the process was forked must not be missing in the child.
TEST(CpuGemm, AForkedChildGoesOn) {
  constexpr int kCallers = 4, kForks = 30, kSeconds = 20;
  std::mt19937 rng(kSeed);
  Operands x({33, 300, 500});
  x.randomize(rng);
  const ScaledTensor a = x.a_tensor(), b = x.b_tensor();
  Matrix<Bf16> expected(33, 300), d(33, 300);
  cpu::gemm_fp8(a, b, expected.tensor(), nullptr);
  std::vector<std::jthread> callers;
  for (int i = 0; i < kCallers; ++i)
    callers.emplace_back([&](const std::stop_token& stop) {
      Matrix<Bf16> mine(33, 300);
      while (!stop.stop_requested()) cpu::gemm_fp8(a, b, mine.tensor(), nullptr);
    });
  for (int i = 0; i < kForks; ++i) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      alarm(kSeconds);  // ends a child that waits for ever
      cpu::gemm_fp8(a, b, d.tensor(), nullptr);
      _exit(d.same_bytes(expected) ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_EQ(status, 0) << "child " << i;
  }
}

TEST(CpuGemm, PublicCallReachesTheCpu) {
  std::mt19937 rng(kSeed);
  Operands x({16, 256, 256});
  x.randomize(rng);
  Matrix<float> c(16, 256), expected(16, 256), d(16, 256);
  c.fill([](int64_t i, int64_t j) { return static_cast<float>(i - j); });
  const Tensor c_tensor = c.tensor();
  cpu::gemm_fp8(x.a_tensor(), x.b_tensor(), expected.tensor(), &c_tensor);
  gemm_fp8(x.a_tensor(), x.b_tensor(), d.tensor(), {.c = c_tensor});
  EXPECT_TRUE(d.same_bytes(expected));
}

}  // namespace
}  // namespace phalanx::test
