#pragma once
#include "device/ptx/memory.cuh"

namespace phalanx::ptx {

/// An operand as its descriptor tells: the address of (row, byte of K's 128), or, MN-major, of (row, k).
struct SimtOperand {
  u64 descriptor;

  u32 start() const { return u32(descriptor & 0x3fff) << 4; }
  u32 leading() const { return u32(descriptor >> 16 & 0x3fff) << 4; }
  u32 stride() const { return u32(descriptor >> 32 & 0x3fff) << 4; }
  const u8* k_major(int row, int byte) const {
    return simt::cta->shared + simt_swizzled(start() + row / 8 * stride() + row % 8 * 128 + byte);
  }
  const u8* plain(int row, int byte) const {
    return simt::cta->shared + start() + row / 8 * stride() + byte / 16 * leading() + row % 8 * 16 + byte % 16;
  }
  const u8* mn_major(int row, int k) const {
    return simt::cta->shared +
           simt_swizzled(start() + row / 64 * leading() + k / 8 * stride() + k % 8 * 128 + row % 64 * 2);
  }
};

/// d (+)= this thread's part of the 64 x N x kDepth product; value_a(row, k), value_b(row, k).
template <int N, int kDepth, class A, class B>
void simt_product(float (&d)[N / 2], bool accumulate, const A& value_a, const B& value_b) {
  const int thread = simt::cta->current, row = thread / 32 % 4 * 16 + thread % 32 / 4;
  float a[2][kDepth];
  for (int k = 0; k < kDepth; ++k) a[0][k] = value_a(row, k), a[1][k] = value_a(row + 8, k);
  for (int i = 0; i < N / 8; ++i) {
    for (int j = 0; j < 2; ++j) {
      float sum[2] = {};
      for (int k = 0; k < kDepth; ++k) {
        const float b = value_b(i * 8 + thread % 4 * 2 + j, k);
        sum[0] += a[0][k] * b, sum[1] += a[1][k] * b;
      }
      for (int half = 0; half < 2; ++half) {
        float& x = d[i * 4 + half * 2 + j];
        x = accumulate ? x + sum[half] : sum[half];
      }
    }
  }
}

template <int N>
struct WgmmaE4m3 {
  static void multiply(float (&d)[N / 2], u64 a, u64 b, bool accumulate) {
    static const auto kValues = [] {
      std::array<float, 256> values;
      for (int i = 0; i < 256; ++i) values[i] = cpu::to_f32(cpu::E4m3{u8(i)});
      return values;
    }();
    simt::fiber().products.push_back([&d, a = SimtOperand{a}, b = SimtOperand{b}, accumulate] {
      simt_product<N, 128>(
          d, accumulate, [&](int row, int k) { return kValues[*a.k_major(row, k)]; },
          [&](int row, int k) { return kValues[*b.k_major(row, k)]; });
    });
  }
  static void pin(float (&)[N / 2]) {}
};

}  // namespace phalanx::ptx
