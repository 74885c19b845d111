// The experts of a mixture-of-experts layer from C++: tokens go to their experts' rows, through two FP8 products with SwiGLU
// between them, and come back summed.
//
// It runs anywhere, and with "cuda" on an H200: the calls are the same, the tensors' data point to memory that the GPU reaches, and
// their device says so. Nothing waits for the GPU before the end: how many rows each expert has is never needed on the host.
#include <phalanx/phalanx.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
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
  Quantized(int rows, int cols) : data(rows * cols), scales(rows * (cols / kBlock)), rows(rows), cols(cols) {}
  ScaledTensor tensor() {
    return {row_major(data.data(), DType::e4m3, rows, cols, memory::device),
            col_major(scales.data(), DType::f32, rows, cols / kBlock, memory::device)};
  }
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

/// A stack of weights [kExperts, rows, cols], one scale per 128 x 128 block, quantised as one tall matrix.
struct Weights {
  Weights(Vector<float>& values, int rows, int cols)
      : data(values.size()), scales(values.size() / kBlock / kBlock), rows(rows), cols(cols) {
    quantize_blocks(matrix(values, cols), {row_major(data.data(), DType::e4m3, kExperts * rows, cols, memory::device),
                                           matrix(scales, cols / kBlock)});
  }
  ScaledTensor tensor() { return {stack(data.data(), DType::e4m3, 1), stack(scales.data(), DType::f32, kBlock)}; }
  Tensor stack(void* values, DType dtype, int unit) const {
    const std::int64_t height = rows / unit, width = cols / unit;
    return {values, dtype, memory::device, 3, {kExperts, height, width}, {height * width, width, 1}};
  }
  Vector<std::uint8_t> data;
  Vector<float> scales;
  int rows, cols;
};

/// gate · x, silu(gate) * up, down · h, in FP64.
std::vector<double> exact_mlp(const float* x, const float* gate_up, const float* down) {
  std::vector<double> h(kInner), y(kHidden);
  const auto dot = [](const float* row, const auto* v, int size) {
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += double{row[i]} * v[i];
    return sum;
  };
  for (int i = 0; i < kInner; ++i) {
    const double gate = dot(gate_up + i * kHidden, x, kHidden), up = dot(gate_up + (kInner + i) * kHidden, x, kHidden);
    h[i] = gate / (1 + std::exp(-gate)) * up;
  }
  for (int i = 0; i < kHidden; ++i) y[i] = dot(down + i * kInner, h.data(), kInner);
  return y;
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
  auto x = random_floats(kTokens * kHidden, 1, generator);
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

  memory::synchronize();
  double difference = 0, size = 0;
  for (int t = 0; t < kTokens; ++t) {
    std::vector<double> exact(kHidden);
    for (int k = 0; k < kTopK; ++k) {
      const int expert = topk_idx[t * kTopK + k];
      if (expert < 0) continue;
      const auto one =
          exact_mlp(&x[t * kHidden], &gate_up[expert * 2 * kInner * kHidden], &down[expert * kHidden * kInner]);
      for (int i = 0; i < kHidden; ++i) exact[i] += 0.5 * one[i];
    }
    for (int i = 0; i < kHidden; ++i) {
      difference += std::pow(y[t * kHidden + i] - exact[i], 2);
      size += exact[i] * exact[i];
    }
  }
  const double error = std::sqrt(difference / size);
  std::printf("phalanx %s: %d tokens through %d experts (%d, %d, %d, %d rows) in FP8 are %.2f%% from exact\n",
              version(), kTokens, kExperts, counts[0], counts[1], counts[2], counts[3], error * 100);
  return error < 0.08 ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
