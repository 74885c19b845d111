// Division by a number that the host knows. A kernel needs some twenty instructions for one by any other, each after the one
// before: a short kernel feels that.
#pragma once
#include "device/types.h"

namespace phalanx {

// Of numbers from 0 to 2^31 - 1. With 2^shift >= value, magic = ceil(2^(31 + shift) / value) is too large by less than
// 2^-31 of itself, so that no quotient of such numbers changes.
struct Divisor {
  int value = 1;
  u32 magic = 1u << 31;
  int shift = 31;

  constexpr Divisor() = default;
  constexpr explicit Divisor(int divisor) : value(divisor > 0 ? divisor : 1) {
    while ((u64(1) << (shift - 31)) < u64(value)) ++shift;
    magic = u32(((u64(1) << shift) + value - 1) / value);
  }
  constexpr int of(int n) const { return int((u64(u32(n)) * magic) >> shift); }
  constexpr int up(int n) const { return of(n + value - 1); }
  constexpr int rest(int n) const { return n - of(n) * value; }
};

}  // namespace phalanx
