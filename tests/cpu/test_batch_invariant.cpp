// batch_invariant on the CPU: a row's bits are the same in any batch, at any place in it.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "phalanx/gemm.h"
#include "tests/cpu/matrix.h"

namespace phalanx::test {
namespace {

TEST(BatchInvariant, RowsKeepTheirBits) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  constexpr int kRows = 700, kN = 300, kK = 520, kKBlocks = (kK + 127) / 128;
  const auto code = [&](auto, auto) {
    const auto bits = std::uint8_t(rng());
    return cpu::E4m3{std::uint8_t((bits & 0x7f) == 0x7f ? 0 : bits)};
  };
  const auto scale = [&](auto, auto) { return std::exp2(float(rng() % 1000) / 250); };
  Matrix<cpu::E4m3> a(kRows, kK), b(kN, kK);
  Matrix<float> sfa(kRows, kKBlocks), sfb((kN + 127) / 128, kKBlocks);
  a.fill(code), b.fill(code), sfa.fill(scale), sfb.fill(scale);

  const auto multiply = [&](int first, int rows) {
    Matrix<float> d(rows, kN);
    const auto part = [&](Tensor t) {
      t.data = static_cast<char*>(t.data) + first * t.strides[0] * size_of(t.dtype);
      t.shape[0] = rows;
      return t;
    };
    GemmOptions options;
    options.batch_invariant = true;
    gemm_fp8({part(a.tensor()), part(sfa.tensor())}, {b.tensor(), sfb.tensor()}, d.tensor(), options);
    return d;
  };
  const Matrix<float> whole = multiply(0, kRows);
  for (const int rows : {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 300, 511, 513}) {
    const int first = int(rng() % (kRows - rows + 1));
    const Matrix<float> d = multiply(first, rows);
    for (int i = 0; i < rows; ++i)
      ASSERT_EQ(std::memcmp(&d.at(i, 0), &whole.at(first + i, 0), kN * sizeof(float)), 0)
          << "row " << i << " of " << rows << " from " << first;
  }
}

}  // namespace
}  // namespace phalanx::test
