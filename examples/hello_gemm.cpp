// A matrix product in FP8 from C++: quantise, multiply, and see how far the result is from FP32's.
//
// Everything lies in CPU memory, so this runs anywhere. On an H200 the calls are the same: the tensors' data point to
// GPU memory, their device is {DeviceType::cuda, 0}, and the options carry the stream.
#include <phalanx/phalanx.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

namespace {

constexpr int kM = 64, kN = 256, kK = 512;
constexpr int kBlock = 128;  // elements that share a scale

std::vector<float> random_floats(int count, std::mt19937& generator) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// Root mean square of d - a · bᵀ, in units of the product's own.
double relative_error(const std::vector<float>& d, const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 0;
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      double exact = 0;
      for (int k = 0; k < kK; ++k) exact += double{a[m * kK + k]} * b[n * kK + k];
      difference += std::pow(d[m * kN + n] - exact, 2);
      size += exact * exact;
    }
  }
  return std::sqrt(difference / size);
}

}  // namespace

int main() try {
  using namespace phalanx;
  std::mt19937 generator(1);
  auto activations = random_floats(kM * kK, generator);
  auto weights = random_floats(kN * kK, generator);

  // The library owns no memory: make room for the E4M3 matrices, their scales and the result.
  std::vector<std::uint8_t> a_data(kM * kK), b_data(kN * kK);
  std::vector<float> a_scales(kM * kK / kBlock), b_scales(kN / kBlock * kK / kBlock), d_data(kM * kN);

  const ScaledTensor a{row_major(a_data.data(), DType::e4m3, kM, kK),
                       col_major(a_scales.data(), DType::f32, kM, kK / kBlock)};
  const ScaledTensor b{row_major(b_data.data(), DType::e4m3, kN, kK),
                       row_major(b_scales.data(), DType::f32, kN / kBlock, kK / kBlock)};
  const Tensor d = row_major(d_data.data(), DType::f32, kM, kN);

  quantize_rows(row_major(activations.data(), DType::f32, kM, kK), a);  // one scale per 1 x 128 block
  quantize_blocks(row_major(weights.data(), DType::f32, kN, kK), b);    // one scale per 128 x 128 block
  gemm_fp8(a, b, d);                                                    // d = a · bᵀ

  const double error = relative_error(d_data, activations, weights);
  std::printf("phalanx %s: [%d, %d] x [%d, %d]^T in FP8 is %.2f%% from FP32\n", version(), kM, kK, kN, kK, error * 100);
  return error < 0.06 ? 0 : 1;
} catch (const phalanx::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
