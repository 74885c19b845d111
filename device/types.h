// Integer names for code that may include nothing, not even <cstdint>.
#pragma once

namespace phalanx {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}

template <bool kCondition, class A, class B>
struct Conditional {
  using Type = A;
};
template <class A, class B>
struct Conditional<false, A, B> {
  using Type = B;
};

constexpr int log2_of(int power_of_two) { return power_of_two > 1 ? 1 + log2_of(power_of_two / 2) : 0; }

constexpr int gcd_of(int a, int b) { return b == 0 ? a : gcd_of(b, a % b); }

}  // namespace phalanx
