#pragma once
#include "device/ptx/convert.cuh"
#include "device/ptx/wgmma_e4m3.cuh"

namespace phalanx::ptx {

template <int N, bool kMnA, bool kMnB>
struct WgmmaBf16 {
  static void multiply(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    const auto value = [](auto major, SimtOperand operand, int row, int k) {
      u16 bits;
      std::memcpy(&bits, major ? operand.mn_major(row, k) : operand.k_major(row, k * 2), 2);
      return bf16_to_float(bits);
    };
    simt::fiber().products.push_back([=, &d] {
      simt_product<N, 64>(
          d, accumulate, [&](int row, int k) { return value(kMnA, {a}, row, k); },
          [&](int row, int k) { return value(kMnB, {b}, row, k); });
    });
  }
  static void pin(float (&)[N / 2]) {}
};

}  // namespace phalanx::ptx
