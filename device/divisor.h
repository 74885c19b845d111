// Division by a number that the host knows. A kernel needs some twenty instructions for one by any other, each after
// the one before: a short kernel feels that.
#pragma once
#include "device/types.h"

namespace phalanx {

// Of numbers n from 0 to 2^31 - 1. magic = ceil(2^shift / value), where 2^(shift - 31) is the first power of two not
// below `value`: so it has 32 bits and is too large by less than 2^-31 of itself, n * magic / 2^shift by less than 1 /
// value.
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
