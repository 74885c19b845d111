// The kernels of quantisation and SwiGLU, simulated on the host: the bytes of the CPU backend, and nothing written
// beside them.
#include <gtest/gtest.h>

#include <random>

#include "cpu/cpu.h"
#include "device/quantize/quantize.cuh"
#include "device/quantize/swiglu.cuh"
#include "device/quantize/swiglu_backward.cuh"
#include "device/quantize/swiglu_tiles.cuh"
#include "ops/scaled_matrix.h"
#include "simt.h"
#include "tests/cpu/matrix.h"

namespace phalanx::test {
namespace {

template <class T>
constexpr FloatType kType = sizeof(T) == 4                 ? FloatType::f32
                            : std::is_same_v<T, cpu::Bf16> ? FloatType::bf16
                                                           : FloatType::f16;

/// E4M3 with its scales, twice: from the CPU backend and from a kernel.
struct Outputs {
  Outputs(int rows, int cols, bool blocks = false) {
    for (int i = 0; i < 2; ++i) {
      data.emplace_back(rows, cols, 1);
      scales.emplace_back(blocks ? (rows + 127) / 128 : rows, (cols + 127) / 128, 0, Order::col_major);
    }
  }
  ScaledTensor of_cpu() { return {data[0].tensor(), scales[0].tensor()}; }
  ScaledTensor of_kernel() { return {data[1].tensor(), scales[1].tensor()}; }
  void expect_equal() const {
    ASSERT_TRUE(data[0].same_bytes(data[1]));
    ASSERT_TRUE(scales[0].same_bytes(scales[1]));
  }
  std::vector<Matrix<cpu::E4m3>> data;
  std::vector<Matrix<float>> scales;
};

template <class T>
Matrix<T> random_matrix(int rows, int cols, std::mt19937& rng, bool specials = true) {
  Matrix<T> x(rows, cols, 1);
  std::normal_distribution<float> normal(0, 4);
  x.fill([&](auto i, auto j) {
    if (specials && (i * 31 + j) % 97 == 5) return cpu::from_f32<T>(j % 2 ? INFINITY : NAN);
    return cpu::from_f32<T>(i % 11 == 3 ? 0.0f : normal(rng));
  });
  return x;
}

int num_row_ctas(FloatType type, int rows, int cols, int rows_per_warp) {
  return int(ceil_div<i64>(RowTiles::num_warps(type, rows, cols, rows_per_warp), RowTiles::kThreads / 32));
}

template <class T, QuantizeForm kForm>
void run_quantize(Matrix<T>& x, bool pow2) {
  constexpr QuantizeConfig kConfig{kType<T>, kForm};
  constexpr bool kByRows = kForm == QuantizeForm::rows, kByBlocks = kForm == QuantizeForm::blocks;
  constexpr bool kTransposed = kForm == QuantizeForm::transposed || kForm == QuantizeForm::both;
  const int rows = int(x.rows()), cols = int(x.cols());
  Outputs q(rows, cols, kByBlocks), q_t(cols, rows);
  const Tensor in = x.tensor(), data = q.of_kernel().data;
  const ScaleShape shape = kByBlocks ? ScaleShape::block_128x128 : ScaleShape::row_1x128;
  if (kForm != QuantizeForm::transposed) cpu::quantize(in, q.of_cpu(), shape, pow2);
  if (kTransposed) cpu::quantize_transposed(in, q_t.of_cpu(), pow2);
  for (const int rows_per_warp : {1, RowTiles::kMany}) {
    const QuantizeParams params{.x = in.data,
                                .x_stride = row_stride(in),
                                .q = scaled_matrix(q.of_kernel()),
                                .q_t = scaled_matrix(q_t.of_kernel()),
                                .rows = rows,
                                .cols = cols,
                                .rows_per_warp = rows_per_warp,
                                .vectors = has_vectors(in, &data, cols),
                                .pow2_scales = pow2};
    const int num_ctas =
        kByRows ? num_row_ctas(kType<T>, rows, cols, rows_per_warp) : int(SquareTiles::num_ctas(rows, cols));
    simt::launch(num_ctas, kConfig.num_threads(), [&] { quantize<kConfig>(params); });
    q.expect_equal();
    q_t.expect_equal();
    if (!kByRows) break;
  }
}

template <class T>
class Simulated : public ::testing::Test {};
using Types = ::testing::Types<cpu::Bf16, cpu::F16, float>;
TYPED_TEST_SUITE(Simulated, Types);

TYPED_TEST(Simulated, QuantisesToTheBytesOfTheCpu) {
  std::mt19937 rng(kSeed);
  for (const auto& [rows, cols] : {std::pair{1, 1}, {5, 304}, {130, 257}, {33, 128}, {144, 136}}) {
    SCOPED_TRACE(::testing::Message() << rows << "x" << cols);
    auto x = random_matrix<TypeParam>(rows, cols, rng);
    run_quantize<TypeParam, QuantizeForm::rows>(x, rows % 2);
    run_quantize<TypeParam, QuantizeForm::blocks>(x, rows % 2);
    run_quantize<TypeParam, QuantizeForm::transposed>(x, rows % 2);
    run_quantize<TypeParam, QuantizeForm::both>(x, rows % 2);
    if (this->HasFatalFailure()) return;
  }
}

// --- SwiGLU ----------------------------------------------------------------------------------------------------------

template <class T>
struct Problem {
  int rows, cols;
  bool interleaved;
  float limit;
  Matrix<T> x, grad;
  Matrix<float> weights;

  Problem(int m, int n, bool in_turn, float cut, std::mt19937& rng)
      : rows(m),
        cols(n),
        interleaved(in_turn),
        limit(cut),
        x(random_matrix<T>(m, 2 * n, rng, sizeof(T) == 2)),  // the bits of an FP32 NaN are the host's here
        grad(random_matrix<T>(m, n, rng, false)),
        weights(random_matrix<float>(1, m, rng, false)) {}

  SwigluOptions options() {
    Tensor vector = weights.tensor();
    vector.ndim = 1, vector.shape[0] = rows, vector.strides[0] = 1;
    return {.interleaved = interleaved, .limit = limit, .weights = vector, .pow2_scales = false, .stream = {}};
  }
  const float* weight_data() { return static_cast<const float*>(weights.tensor().data); }

  SwigluParams forward(const ScaledTensor& q, const ScaledMatrix& q_t, int rows_per_warp) {
    const Tensor in = x.tensor();
    return {.x = in.data,
            .x_stride = row_stride(in),
            .q = scaled_matrix(q),
            .q_t = q_t,
            .weights = weight_data(),
            .weight_stride = 1,
            .rows = rows,
            .cols = cols,
            .rows_per_warp = rows_per_warp,
            .limit = limit,
            .interleaved = interleaved,
            .vectors = has_vectors(in, &q.data, cols),
            .pow2_scales = false};
  }
};

template <class T>
void run_forward(Problem<T>& problem) {
  constexpr SwigluConfig kConfig{kType<T>};
  Outputs q(problem.rows, problem.cols);
  cpu::swiglu_quantize(problem.x.tensor(), q.of_cpu(), problem.options());
  for (const int rows_per_warp : {1, RowTiles::kMany}) {
    const SwigluParams params = problem.forward(q.of_kernel(), {}, rows_per_warp);
    const int num_ctas = num_row_ctas(kType<T>, problem.rows, problem.cols, rows_per_warp);
    simt::launch(num_ctas, kConfig.num_threads(), [&] { swiglu_quantize<kConfig>(params); });
    q.expect_equal();
  }
}

template <class T>
void run_backward(Problem<T>& problem) {
  constexpr SwigluBackwardConfig kConfig{kType<T>};
  const int rows = problem.rows, cols = problem.cols;
  Matrix<T> expected(rows, 2 * cols, 1), actual(rows, 2 * cols, 1);
  const Tensor x = problem.x.tensor(), grad = problem.grad.tensor(), grad_x = actual.tensor();
  cpu::swiglu_backward(x, grad, expected.tensor(), nullptr, problem.options());
  for (const int rows_per_cta : {1, WholeRows::kMany}) {
    std::vector<float> sums(rows);
    const SwigluBackwardParams params{.x = x.data,
                                      .x_stride = row_stride(x),
                                      .grad = grad.data,
                                      .grad_stride = row_stride(grad),
                                      .grad_x = grad_x.data,
                                      .grad_x_stride = row_stride(grad_x),
                                      .weights = problem.weight_data(),
                                      .weight_stride = 1,
                                      .grad_weights = sums.data(),
                                      .grad_weight_stride = 1,
                                      .rows = rows,
                                      .cols = cols,
                                      .rows_per_cta = rows_per_cta,
                                      .limit = problem.limit,
                                      .interleaved = problem.interleaved,
                                      .vectors = has_vectors(x, nullptr, cols)};
    simt::launch(ceil_div(rows, rows_per_cta), kConfig.num_threads(), [&] { swiglu_backward<kConfig>(params); });
    ASSERT_TRUE(actual.same_bytes(expected));
  }
}

void run_both(Problem<cpu::Bf16>& problem) {
  constexpr SwigluTilesConfig kConfig{FloatType::bf16}, kPairs{.type = FloatType::bf16, .pairs = true};
  const int rows = problem.rows, cols = problem.cols;
  Outputs q(rows, cols), q_t(cols, rows);
  const Tensor x = problem.x.tensor(), grad = problem.grad.tensor();
  cpu::swiglu_quantize_both(x, q.of_cpu(), q_t.of_cpu(), problem.options());
  const SwigluParams forward = problem.forward(q.of_kernel(), scaled_matrix(q_t.of_kernel()), 0);
  simt::launch(int(SquareTiles::num_ctas(rows, cols)), kConfig.num_threads(),
               [&] { swiglu_quantize_both<kConfig>(forward); });
  q.expect_equal();
  q_t.expect_equal();

  if (cols % 8 != 0) return;
  const bool vectors = has_vectors(x, nullptr, cols);
  const auto run_backward = [&](const SwigluTilesConfig& config, const auto& kernel) {
    Outputs g(rows, 2 * cols), g_t(2 * cols, rows);
    cpu::swiglu_backward_both(x, grad, g.of_cpu(), g_t.of_cpu(), problem.options());
    const SwigluBackwardBothParams params{.x = x.data,
                                          .x_stride = row_stride(x),
                                          .grad = grad.data,
                                          .grad_stride = row_stride(grad),
                                          .q = scaled_matrix(g.of_kernel()),
                                          .q_t = scaled_matrix(g_t.of_kernel()),
                                          .weights = problem.weight_data(),
                                          .weight_stride = 1,
                                          .rows = rows,
                                          .cols = cols,
                                          .limit = problem.limit,
                                          .interleaved = problem.interleaved,
                                          .vectors = vectors,
                                          .pow2_scales = false};
    simt::launch(int(config.num_backward_ctas(rows, cols)), config.num_threads(), [&] { kernel(params); });
    g.expect_equal();
    g_t.expect_equal();
  };
  run_backward(kConfig, swiglu_backward_both<kConfig>);
  if (vectors && (problem.interleaved || cols % kQuantizeBlock == 0))
    run_backward(kPairs, swiglu_backward_both<kPairs>);
}

TYPED_TEST(Simulated, SwigluGivesTheBytesOfTheCpu) {
  std::mt19937 rng(kSeed);
  for (const auto& [rows, cols] : {std::pair{1, 8}, {6, 304}, {17, 33}, {133, 136}, {130, 256}}) {
    if (rows > 128 && !std::is_same_v<TypeParam, cpu::Bf16>) continue;  // for the square tiles
    for (const bool interleaved : {false, true}) {
      if (interleaved && cols % 8 != 0) continue;
      for (const float limit : {INFINITY, 3.0f}) {
        SCOPED_TRACE(::testing::Message() << rows << "x" << cols << (interleaved ? " interleaved " : " ") << limit);
        Problem<TypeParam> problem(rows, cols, interleaved, limit, rng);
        run_forward(problem);
        run_backward(problem);
        if constexpr (std::is_same_v<TypeParam, cpu::Bf16>) run_both(problem);
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace phalanx::test
