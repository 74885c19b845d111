// SwiGLU in FP32, written once for CPU and GPU: every step is one IEEE operation, in this order, so that both compute
// the same bits. docs/numerics.md has the bounds.
//
//   g = max(min(gate, limit), -80),  u = max(min(up, limit), -limit)     NaN stays NaN
//   s = 1 / (1 + e^-g),  h = ((g * s) * u) * weight
//
// `Math` supplies the operations: fma(a, b, c), rounded once; reciprocal(d), rounded to nearest, for 1 <= d < 2^125;
// min and max, which keep NaN; bits_of(float), float_of(u32). No product here is added to anything but in an fma: there
// is nothing to contract.
#pragma once
#include "device/types.h"

namespace phalanx {

// Below, e^-g would leave the range of `reciprocal`; silu is less than 2e-33 in magnitude there.
constexpr float kSwigluMinGate = -80.0f;

// e^-x for |x| <= 80. With y = -x * log2(e), n the integer nearest to y and f the rest: 2^n * 2^f. 2^f is a polynomial
// on [-1/2, 1/2], off by less than 1.7e-7 of it.
template <class Math>
constexpr float exp_minus(float x) {
  constexpr float kMinusLog2E = -0x1.715476p+0f;
  constexpr float kRound = 0x1.8p23f;  // added to a small number, its last bits are the number rounded to an integer
  const float shifted = Math::fma(x, kMinusLog2E, kRound);
  const float f = Math::fma(x, kMinusLog2E, kRound - shifted);
  float p = Math::fma(0x1.5bba14p-10f, f, 0x1.3cea88p-7f);
  p = Math::fma(p, f, 0x1.c6b752p-5f);
  p = Math::fma(p, f, 0x1.ebf9bcp-3f);
  p = Math::fma(p, f, 0x1.62e42ap-1f);
  p = Math::fma(p, f, 1.0f);
  return Math::float_of(Math::bits_of(p) + (Math::bits_of(shifted) << 23));  // n is added to the exponent
}

template <class Math>
constexpr float sigmoid(float g) {
  return Math::reciprocal(1.0f + exp_minus<Math>(Math::min(g, -kSwigluMinGate)));
}

// h without the weight. kLimited: false if the limit is infinite, where it makes no difference but work.
template <class Math, bool kLimited = true>
constexpr float swiglu_value(float gate, float up, float limit) {
  const float g = Math::max(kLimited ? Math::min(gate, limit) : gate, kSwigluMinGate);
  const float u = kLimited ? Math::max(Math::min(up, limit), -limit) : up;
  return g * sigmoid<Math>(g) * u;
}

// The gradients of gate and up, given dh: that of h, times the weight. Where a clamp has cut, the gradient is zero.
//
//   d_gate = (dh * u) * (s + (g * s) * (1 - s)),  d_up = dh * (g * s)
struct SwigluGradient {
  float gate, up;
  float unweighted;  // h without the weight, whose gradient is the sum of it times that of h
};

template <class Math, bool kLimited = true>
constexpr SwigluGradient swiglu_gradient(float gate, float up, float limit, float dh) {
  const float g = Math::max(kLimited ? Math::min(gate, limit) : gate, kSwigluMinGate);
  const float u = kLimited ? Math::max(Math::min(up, limit), -limit) : up;
  const float s = sigmoid<Math>(g), silu = g * s, slope = Math::fma(silu, 1.0f - s, s);
  const bool gate_cut = kLimited && gate > limit, up_cut = kLimited && (up > limit || up < -limit);
  return {.gate = gate_cut ? 0.0f : dh * u * slope, .up = up_cut ? 0.0f : dh * silu, .unweighted = silu * u};
}

// Where the gate of output column c lies in a row of x, and how far behind it the up: halves [gate | up], or 8 and 8 in
// turn.
constexpr i64 swiglu_gate_column(i64 c, bool interleaved) { return interleaved ? 2 * c - c % 8 : c; }
constexpr i64 swiglu_up_distance(i64 cols, bool interleaved) { return interleaved ? 8 : cols; }

}  // namespace phalanx
