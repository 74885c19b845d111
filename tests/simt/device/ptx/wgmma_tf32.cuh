#pragma once
#include "device/ptx/wgmma_e4m3.cuh"

namespace phalanx::ptx {

template <int N>
struct WgmmaTf32 {
  static void multiply(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    const auto value = [](SimtOperand operand, int row, int k) {
      u32 bits;
      std::memcpy(&bits, operand.plain(row, k * 4), 4);
      return std::bit_cast<float>(bits & 0xffffe000);
    };
    simt::fiber().products.push_back([=, &d] {
      simt_product<N, 8>(
          d, accumulate, [&](int row, int k) { return value({a}, row, k); },
          [&](int row, int k) { return value({b}, row, k); });
    });
  }
  static void pin(float (&)[N / 2]) {}
};

}  // namespace phalanx::ptx
