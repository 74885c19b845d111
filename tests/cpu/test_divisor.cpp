// Divisors against the processor's own division.
#include <gtest/gtest.h>

#include <random>

#include "device/divisor.h"

namespace phalanx {
namespace {

constexpr int kLargest = 2147483647;

void check(int divisor, int n) {
  const Divisor by(divisor);
  ASSERT_EQ(by.of(n), n / divisor) << n << " / " << divisor;
  ASSERT_EQ(by.rest(n), n % divisor) << n << " % " << divisor;
  if (n <= kLargest - divisor) {
    ASSERT_EQ(by.up(n), (n + divisor - 1) / divisor) << n << " / " << divisor;
  }
}

TEST(Divisor, EveryQuotientOfSmallDivisorsNearTheirMultiples) {
  for (int divisor = 1; divisor <= 3000; ++divisor)
    for (int quotient : {0, 1, 2, 3, 100, 65535, kLargest / divisor - 1, kLargest / divisor})
      for (int rest : {-1, 0, 1, divisor - 1})
        if (const i64 n = i64(quotient) * divisor + rest; n >= 0 && n <= kLargest) check(divisor, int(n));
}

TEST(Divisor, RandomNumbers) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  for (int i = 0; i < 1'000'000; ++i) check(1 + int(rng() >> (1 + rng() % 31)) % kLargest, int(rng() >> 1));
  for (int divisor : {kLargest, kLargest - 1, 1 << 30, (1 << 30) + 1})
    for (int n : {0, 1, 1 << 30, kLargest - 1, kLargest}) check(divisor, n);
}

TEST(Divisor, OfNothingIsAsOne) { EXPECT_EQ(Divisor(0).of(kLargest), kLargest); }

}  // namespace
}  // namespace phalanx
