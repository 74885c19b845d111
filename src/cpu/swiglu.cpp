// SwiGLU with quantisation, and its gradients: device/quantize/swiglu.h in the same operations as on the GPU.
#include "device/quantize/swiglu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/encode.h"
#include "cpu/fma.h"
#include "cpu/parallel.h"

namespace phalanx::cpu {
namespace {

using std::int64_t;

struct CpuMath {
  static float fma(float a, float b, float c) { return std::fma(a, b, c); }
  // Only the first operand can be NaN.
  static float min(float a, float b) { return b < a ? b : a; }
  static float max(float a, float b) { return b > a ? b : a; }
  static float reciprocal(float d) { return 1.0f / d; }
  static u32 bits_of(float x) { return std::bit_cast<u32>(x); }
  static float float_of(u32 bits) { return std::bit_cast<float>(bits); }
};

PHALANX_FMA_CLONES
void swiglu_row(const Row& gate, const Row& up, float limit, float weight, int64_t count, Row& h) {
  for (int64_t i = 0; i < count; ++i) h[i] = swiglu_value<CpuMath>(gate[i], up[i], limit) * weight;
}

/// gate and up become their gradients, dh the unweighted h.
PHALANX_FMA_CLONES
void swiglu_backward_row(Row& gate, Row& up, float limit, float weight, int64_t count, Row& dh) {
  for (int64_t i = 0; i < count; ++i) {
    const SwigluGradient gradient = swiglu_gradient<CpuMath>(gate[i], up[i], limit, dh[i] * weight);
    gate[i] = gradient.gate, up[i] = gradient.up, dh[i] = gradient.unweighted;
  }
}

/// `count` columns of gate and up, from output column `col` on.
template <class T>
struct GateUp {
  T* row;
  int64_t cols;
  bool interleaved;

  T* gate(int64_t c) const { return row + swiglu_gate_column(c, interleaved); }
  T* up(int64_t c) const { return gate(c) + swiglu_up_distance(cols, interleaved); }
};

template <class T>
GateUp<T> gate_up(const Tensor& x, int64_t row, bool interleaved) {
  return {static_cast<T*>(x.data) + row * x.strides[0], x.cols() / 2, interleaved};
}

float weight_of(const SwigluOptions& options, int64_t row) {
  return options.weights ? static_cast<const float*>(options.weights->data)[row * options.weights->strides[0]] : 1.0f;
}

/// Calls f(row) for every row, on all cores.
template <class F>
void for_each_row(const Tensor& x, const F& f) {
  constexpr int64_t kBand = 16;
  const int64_t rows = x.rows();
  TaskQueue bands((rows + kBand - 1) / kBand);
  run_on_threads(threads_for((rows + kBand - 1) / kBand, 1.5 * static_cast<double>(kBand * x.cols())), [&](int) {
    for (int64_t band; bands.next(band);)
      for (int64_t row = band * kBand; row < std::min(rows, (band + 1) * kBand); ++row) f(row);
  });
}

/// Calls f(col, count, h) for every block of 128 columns of a row of the result.
template <class T, class F>
void for_each_block(const Tensor& x, int64_t row, const SwigluOptions& options, const F& f) {
  const auto in = gate_up<const T>(x, row, options.interleaved);
  for (int64_t col = 0; col < in.cols; col += kQuantizeBlock) {
    const int64_t count = std::min<int64_t>(kQuantizeBlock, in.cols - col);
    Row gate, up, h;
    for (int64_t i = 0; i < count; ++i) gate[i] = to_f32(*in.gate(col + i)), up[i] = to_f32(*in.up(col + i));
    swiglu_row(gate, up, options.limit, weight_of(options, row), count, h);
    f(col, count, h);
  }
}

template <class T>
void swiglu_quantize_as(const Tensor& x, const ScaledTensor& q, const SwigluOptions& options) {
  for_each_row(x, [&](int64_t row) {
    E4m3* out = static_cast<E4m3*>(q.data.data) + row * q.data.strides[0];
    float* scales = static_cast<float*>(q.scales.data) + row * q.scales.strides[0];
    for_each_block<T>(x, row, options, [&](int64_t col, int64_t count, const Row& h) {
      scales[col / kQuantizeBlock * q.scales.strides[1]] = quantize_row(h, count, options.pow2_scales, out + col);
    });
  });
}

template <class T>
void swiglu_backward_as(const Tensor& x, const Tensor& grad, const Tensor& grad_x, const Tensor* grad_weights,
                        const SwigluOptions& options) {
  for_each_row(x, [&](int64_t row) {
    const auto in = gate_up<const T>(x, row, options.interleaved);
    const auto out = gate_up<T>(grad_x, row, options.interleaved);
    const T* dh = static_cast<const T*>(grad.data) + row * grad.strides[0];
    double weight_gradient = 0;
    for (int64_t col = 0; col < in.cols; col += kQuantizeBlock) {
      const int64_t count = std::min<int64_t>(kQuantizeBlock, in.cols - col);
      Row gate, up, h;
      for (int64_t i = 0; i < count; ++i) gate[i] = to_f32(*in.gate(col + i)), up[i] = to_f32(*in.up(col + i));
      widen(dh + col, count, h);
      swiglu_backward_row(gate, up, options.limit, weight_of(options, row), count, h);
      for (int64_t i = 0; i < count; ++i) {
        *out.gate(col + i) = from_f32<T>(gate[i]), *out.up(col + i) = from_f32<T>(up[i]);
        weight_gradient += double(to_f32(dh[col + i])) * h[i];
      }
    }
    if (grad_weights) static_cast<float*>(grad_weights->data)[row * grad_weights->strides[0]] = float(weight_gradient);
  });
}

}  // namespace

void swiglu_quantize(const Tensor& x, const ScaledTensor& q, const SwigluOptions& options) {
  switch (x.dtype) {
    case DType::bf16:
      return swiglu_quantize_as<Bf16>(x, q, options);
    case DType::f16:
      return swiglu_quantize_as<F16>(x, q, options);
    default:
      return swiglu_quantize_as<float>(x, q, options);
  }
}

void swiglu_backward(const Tensor& x, const Tensor& grad, const Tensor& grad_x, const Tensor* grad_weights,
                     const SwigluOptions& options) {
  switch (x.dtype) {
    case DType::bf16:
      return swiglu_backward_as<Bf16>(x, grad, grad_x, grad_weights, options);
    case DType::f16:
      return swiglu_backward_as<F16>(x, grad, grad_x, grad_weights, options);
    default:
      return swiglu_backward_as<float>(x, grad, grad_x, grad_weights, options);
  }
}

void swiglu_quantize_both(const Tensor& x, const ScaledTensor& q, const ScaledTensor& q_t,
                          const SwigluOptions& options) {
  const int64_t rows = x.rows(), cols = x.cols() / 2;
  std::vector<float> h(rows * cols);
  for_each_row(x, [&](int64_t row) {
    for_each_block<Bf16>(x, row, options, [&](int64_t col, int64_t count, const Row& block) {
      std::copy_n(block.begin(), count, h.begin() + row * cols + col);
    });
  });
  const Tensor all = row_major(h.data(), DType::f32, rows, cols);
  quantize(all, q, ScaleShape::row_1x128, options.pow2_scales);
  quantize_transposed(all, q_t, options.pow2_scales);
}

void swiglu_backward_both(const Tensor& x, const Tensor& grad, const ScaledTensor& q, const ScaledTensor& q_t,
                          const SwigluOptions& options) {
  std::vector<Bf16> gradient(x.rows() * x.cols());
  const Tensor all = row_major(gradient.data(), DType::bf16, x.rows(), x.cols());
  swiglu_backward(x, grad, all, nullptr, options);
  quantize(all, q, ScaleShape::row_1x128, options.pow2_scales);
  quantize_transposed(all, q_t, options.pow2_scales);
}

}  // namespace phalanx::cpu
