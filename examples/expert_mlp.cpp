// The experts of a mixture-of-experts layer from C++: tokens go to their experts' rows, through two FP8 products with
// SwiGLU between them, and come back summed; and the gradients of that, of tokens and weights, by FP8 products too.
//
// It runs anywhere, and with "cuda" on an H200: the calls are the same, the tensors' data point to memory that the GPU
// reaches, and their device says so. Nothing waits for the GPU before the end: how many rows each expert has is never
// needed on the host.
#include <phalanx/phalanx.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <random>

#include "memory.h"

namespace {

using namespace phalanx;
using memory::Vector;

constexpr int kTokens = 40, kTopK = 2, kExperts = 4, kHidden = 256, kInner = 128;
constexpr int kRows = kTokens * kTopK;  // at most
constexpr int kBlock = 128;             // elements that share a scale

/// The library owns no memory.
struct Quantized {
  Quantized(int rows, int cols) : data(rows * cols), scales(rows * blocks(cols)), rows(rows), cols(cols) {}
  ScaledTensor tensor() {
    return {row_major(data.data(), DType::e4m3, rows, cols, memory::device),
            col_major(scales.data(), DType::f32, rows, blocks(cols), memory::device)};
  }
  static int blocks(int cols) { return (cols + kBlock - 1) / kBlock; }
  Vector<std::uint8_t> data;
  Vector<float> scales;
  int rows, cols;
};

Tensor matrix(Vector<float>& values, int cols) {
  return row_major(values.data(), DType::f32, std::int64_t(values.size()) / cols, cols, memory::device);
}
Tensor matrix(Vector<std::int32_t>& values, int cols) {
  return row_major(values.data(), DType::int32, std::int64_t(values.size()) / cols, cols, memory::device);
}
Tensor vector(Vector<std::int32_t>& values) {
  return {values.data(), DType::int32, memory::device, 1, {std::int64_t(values.size())}, {1}};
}

/// A matrix for each expert.
Tensor stack(void* values, DType dtype, std::int64_t rows, std::int64_t cols) {
  return {values, dtype, memory::device, 3, {kExperts, rows, cols}, {rows * cols, cols, 1}};
}
Vector<float> transposed(const Vector<float>& values, int rows, int cols) {
  Vector<float> result(values.size());
  for (int e = 0; e < kExperts; ++e)
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < cols; ++j) result[(e * cols + j) * rows + i] = values[(e * rows + i) * cols + j];
  return result;
}

/// A stack of weights [kExperts, rows, cols], one scale per 128 x 128 block, quantised as one tall matrix.
struct Weights {
  Weights(Vector<float> values, int rows, int cols)
      : data(values.size()), scales(values.size() / kBlock / kBlock), rows(rows), cols(cols) {
    quantize_blocks(matrix(values, cols), {row_major(data.data(), DType::e4m3, kExperts * rows, cols, memory::device),
                                           matrix(scales, cols / kBlock)});
  }
  ScaledTensor tensor() {
    return {stack(data.data(), DType::e4m3, rows, cols),
            stack(scales.data(), DType::f32, rows / kBlock, cols / kBlock)};
  }
  Vector<std::uint8_t> data;
  Vector<float> scales;
  int rows, cols;
};

/// The same in FP64: y, and the gradients of sum(y * grad).
struct Exact {
  std::vector<double> y = std::vector<double>(kTokens * kHidden), grad_x = y,
                      grad_gate_up = std::vector<double>(kExperts * 2 * kInner * kHidden),
                      grad_down = std::vector<double>(kExperts * kHidden * kInner);

  /// Token t through an expert: gate · x, up · x, h = silu(gate) * up, weight * down · h.
  void add(int t, int expert, double weight, const float* x, const float* gate_up, const float* down,
           const float* grad) {
    gate_up += expert * 2 * kInner * kHidden;
    down += expert * kHidden * kInner;
    for (int i = 0; i < kInner; ++i) {
      const float *gate_row = gate_up + i * kHidden, *up_row = gate_row + kInner * kHidden;
      double gate = 0, up = 0, grad_h = 0;
      for (int c = 0; c < kHidden; ++c) {
        gate += double{gate_row[c]} * x[c];
        up += double{up_row[c]} * x[c];
        grad_h += weight * grad[c] * down[c * kInner + i];
      }
      const double sigmoid = 1 / (1 + std::exp(-gate)), h = gate * sigmoid * up;
      const double grad_gate = grad_h * up * sigmoid * (1 + gate * (1 - sigmoid)), grad_up = grad_h * gate * sigmoid;
      double *of_gate = &grad_gate_up[(expert * 2 * kInner + i) * kHidden], *of_up = of_gate + kInner * kHidden;
      for (int c = 0; c < kHidden; ++c) {
        y[t * kHidden + c] += weight * down[c * kInner + i] * h;
        grad_x[t * kHidden + c] += grad_gate * gate_row[c] + grad_up * up_row[c];
        of_gate[c] += grad_gate * x[c];
        of_up[c] += grad_up * x[c];
        grad_down[(expert * kHidden + c) * kInner + i] += weight * grad[c] * h;
      }
    }
  }
};

double relative_error(const Vector<float>& values, const std::vector<double>& exact) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < exact.size(); ++i) {
    difference += std::pow(values[i] - exact[i], 2);
    size += exact[i] * exact[i];
  }
  return std::sqrt(difference / size);
}

Vector<float> random_floats(std::size_t count, double size, std::mt19937& generator) {
  std::normal_distribution<float> normal(0, float(size));
  Vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc > 1 && std::string(argv[1]) == "cuda") memory::use_gpu(0);
  std::mt19937 generator(1);
  auto x = random_floats(kTokens * kHidden, 1, generator), grad = random_floats(kTokens * kHidden, 1, generator);
  auto gate_up = random_floats(kExperts * 2 * kInner * kHidden, 1 / std::sqrt(kHidden), generator);
  auto down = random_floats(kExperts * kHidden * kInner, 1 / std::sqrt(kInner), generator);
  Vector<std::int32_t> topk_idx(kTokens * kTopK);
  for (auto& expert : topk_idx) expert = std::int32_t(generator() % (kExperts + 1)) - 1;  // -1: none

  // Tokens in the order of experts, in FP8.
  Vector<std::int32_t> counts(kExperts), offsets(kExperts + 1), slots(kTokens * kTopK), sources(kRows), needed(1);
  const Routing routing{vector(counts), vector(offsets), matrix(slots, kTopK), vector(sources), vector(needed)};
  Quantized tokens(kTokens, kHidden), rows(kRows, kHidden), hidden(kRows, kInner);
  quantize_rows(matrix(x, kHidden), tokens.tensor());
  route_and_permute(tokens.tensor(), matrix(topk_idx, kTopK), routing, rows.tensor());

  // Two products with SwiGLU between them: every row by its own expert.
  Weights gate_up_q(gate_up, 2 * kInner, kHidden), down_q(down, kHidden, kInner);
  Vector<float> gate_up_rows(kRows * 2 * kInner), out_rows(kRows * kHidden);
  grouped_gemm_fp8(rows.tensor(), gate_up_q.tensor(), routing.offsets, matrix(gate_up_rows, 2 * kInner));
  swiglu_quantize(matrix(gate_up_rows, 2 * kInner), hidden.tensor());
  grouped_gemm_fp8(hidden.tensor(), down_q.tensor(), routing.offsets, matrix(out_rows, kHidden));

  // Back to the tokens, weighted.
  Vector<float> weights(kTokens * kTopK, 0.5f), y(kTokens * kHidden);
  UnpermuteOptions options;
  options.weights = matrix(weights, kTopK);
  unpermute(matrix(out_rows, kHidden), routing, matrix(y, kHidden), options);

  // The way back: to rows, through the transposed weights, to tokens.
  Vector<float> grad_out(kRows * kHidden), grad_hidden(kRows * kInner), grad_gate_up(kRows * 2 * kInner),
      grad_rows(kRows * kHidden), grad_x(kTokens * kHidden);
  Quantized grad_out_q(kRows, kHidden), grad_out_t(kHidden, kRows), grad_gate_up_q(kRows, 2 * kInner),
      grad_gate_up_t(2 * kInner, kRows);
  Weights down_t(transposed(down, kHidden, kInner), kInner, kHidden),
      gate_up_t(transposed(gate_up, 2 * kInner, kHidden), kHidden, 2 * kInner);
  UnpermuteBackwardOptions backward;
  backward.weights = options.weights;
  unpermute_backward(matrix(grad, kHidden), routing, matrix(grad_out, kHidden), backward);
  quantize_both(matrix(grad_out, kHidden), grad_out_q.tensor(), grad_out_t.tensor());
  grouped_gemm_fp8(grad_out_q.tensor(), down_t.tensor(), routing.offsets, matrix(grad_hidden, kInner));
  swiglu_backward(matrix(gate_up_rows, 2 * kInner), matrix(grad_hidden, kInner), matrix(grad_gate_up, 2 * kInner));
  quantize_both(matrix(grad_gate_up, 2 * kInner), grad_gate_up_q.tensor(), grad_gate_up_t.tensor());
  grouped_gemm_fp8(grad_gate_up_q.tensor(), gate_up_t.tensor(), routing.offsets, matrix(grad_rows, kHidden));
  unpermute(matrix(grad_rows, kHidden), routing, matrix(grad_x, kHidden));

  // The weights' gradients: products over the rows of each expert, so that both operands are transposed.
  Vector<float> x_rows(kRows * kHidden), h_rows(kRows * kInner), grad_of_gate_up(gate_up.size()),
      grad_of_down(down.size());
  Quantized x_t(kHidden, kRows), h_t(kInner, kRows);
  permute(matrix(x, kHidden), routing, matrix(x_rows, kHidden));
  quantize_transposed(matrix(x_rows, kHidden), x_t.tensor());
  dequantize(hidden.tensor(), matrix(h_rows, kInner));
  quantize_transposed(matrix(h_rows, kInner), h_t.tensor());
  grouped_wgrad_fp8(grad_gate_up_t.tensor(), x_t.tensor(), routing.offsets,
                    stack(grad_of_gate_up.data(), DType::f32, 2 * kInner, kHidden));
  grouped_wgrad_fp8(grad_out_t.tensor(), h_t.tensor(), routing.offsets,
                    stack(grad_of_down.data(), DType::f32, kHidden, kInner));

  memory::synchronize();
  Exact exact;
  for (int i = 0; i < kTokens * kTopK; ++i) {
    const int t = i / kTopK;
    if (topk_idx[i] >= 0)
      exact.add(t, topk_idx[i], 0.5, &x[t * kHidden], gate_up.data(), down.data(), &grad[t * kHidden]);
  }
  const double errors[] = {relative_error(y, exact.y), relative_error(grad_x, exact.grad_x),
                           relative_error(grad_of_gate_up, exact.grad_gate_up),
                           relative_error(grad_of_down, exact.grad_down)};
  std::printf("phalanx %s: %d tokens through %d experts (%d, %d, %d, %d rows) in FP8 are %.2f%% from exact\n",
              version(), kTokens, kExperts, counts[0], counts[1], counts[2], counts[3], errors[0] * 100);
  std::printf("gradients of tokens %.2f%%, of gates and ups %.2f%%, of the second weights %.2f%%\n", errors[1] * 100,
              errors[2] * 100, errors[3] * 100);
  return *std::max_element(std::begin(errors), std::end(errors)) < 0.12 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
