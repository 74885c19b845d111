// The kernels that move tokens to experts and back, beside the CPU. Short enough to run under each tool of
// compute-sanitizer.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>

#include "phalanx/moe.h"
#include "tests/cpu/matrix.h"
#include "tests/gpu/on_gpu.h"

namespace phalanx::test {
namespace {

struct Layer {
  int tokens, experts, topk, hidden;  // topk is a multiple of 4, so that Matrix has no gaps where there may be none
  int alignment = 1, max_rows = 0, capacity = -1;
  enum { apart, fused, quantized } how = apart;

  int num_rows() const {
    return max_rows > 0 ? experts * max_rows : capacity >= 0 ? capacity : tokens * topk + experts * (alignment - 1);
  }
};

Tensor as_vector(Tensor row) {
  row.ndim = 1, row.shape[0] = row.shape[1], row.strides[0] = 1;
  return row;
}

/// Every operand and result of a layer.
template <class Row, class Token>
struct Operands {
  Operands(const Layer& shape, std::mt19937& rng)
      : layer(shape),
        topk_idx(shape.tokens, shape.topk, 1),
        counts(1, shape.experts),
        offsets(1, shape.experts + 1),
        slots(shape.tokens, shape.topk),
        sources(1, shape.num_rows()),
        needed(1, 1),
        unquantized(shape.tokens, shape.hidden, 8),
        x(shape.tokens, shape.hidden, 1),
        x_scales(shape.tokens, blocks(), 0, Order::col_major),
        rows(shape.num_rows(), shape.hidden, 2),
        row_scales(shape.num_rows(), blocks(), 0, Order::col_major),
        out_rows(shape.num_rows(), shape.hidden),
        weights(shape.tokens, shape.topk, 1),
        residual(shape.tokens, shape.hidden),
        y(shape.tokens, shape.hidden, 1),
        grad_rows(shape.num_rows(), shape.hidden, 1),
        grad_weights(shape.tokens, shape.topk) {
    std::normal_distribution<float> normal;
    const auto random = [&](auto, auto) { return normal(rng); };
    unquantized.fill([&](auto, auto) { return cpu::from_f32<cpu::Bf16>(normal(rng)); });
    topk_idx.fill([&](auto, auto) { return std::int32_t(rng() % (shape.experts + 1)) - 1; });
    x.fill([&](auto, auto) { return cpu::E4m3{std::uint8_t(rng())}; });
    x_scales.fill(random), weights.fill(random);
    out_rows.fill([&](auto, auto) { return cpu::from_f32<Row>(normal(rng)); });
    residual.fill([&](auto, auto) { return cpu::from_f32<Token>(normal(rng)); });
  }
  int blocks() const { return (layer.hidden + 127) / 128; }

  Layer layer;
  Matrix<std::int32_t> topk_idx, counts, offsets, slots, sources, needed;
  Matrix<cpu::Bf16> unquantized;
  Matrix<cpu::E4m3> x;
  Matrix<float> x_scales;
  Matrix<cpu::E4m3> rows;
  Matrix<float> row_scales;
  Matrix<Row> out_rows;
  Matrix<float> weights;
  Matrix<Token> residual, y;
  Matrix<Row> grad_rows;
  Matrix<float> grad_weights;
};

/// `at(matrix)` is the tensor to use for it.
template <class Row, class Token, class At>
void run(Operands<Row, Token>& o, const At& at) {
  const RouteOptions options{.alignment = o.layer.alignment, .max_rows = o.layer.max_rows, .stream = {}};
  const Routing routing{as_vector(at(o.counts)), as_vector(at(o.offsets)), at(o.slots), as_vector(at(o.sources)),
                        as_vector(at(o.needed))};
  const ScaledTensor x{at(o.x), at(o.x_scales)}, rows{at(o.rows), at(o.row_scales)};
  if (o.layer.how == Layer::quantized) {
    quantize_route_and_permute(at(o.unquantized), x, at(o.topk_idx), routing, rows, true, options);
  } else if (o.layer.how == Layer::fused) {
    route_and_permute(x, at(o.topk_idx), routing, rows, true, options);
  } else {
    route(at(o.topk_idx), routing, options);
    permute(x, routing, rows);
  }
  unpermute(at(o.out_rows), routing, at(o.y), {.weights = at(o.weights), .residual = at(o.residual), .stream = {}});
  unpermute_backward(at(o.residual), routing, at(o.grad_rows),
                     {.weights = at(o.weights), .rows = at(o.out_rows), .grad_weights = at(o.grad_weights)});
}

template <class Row, class Token>
void check_layer(const Layer& layer, std::mt19937& rng) {
  Operands<Row, Token> o(layer, rng);
  const DeviceCopy<std::int32_t> topk_idx(o.topk_idx), counts(o.counts), offsets(o.offsets), slots(o.slots),
      sources(o.sources), needed(o.needed);
  const DeviceCopy<cpu::Bf16> unquantized(o.unquantized);
  const DeviceCopy<cpu::E4m3> x(o.x), rows(o.rows);
  const DeviceCopy<float> x_scales(o.x_scales), row_scales(o.row_scales), weights(o.weights),
      grad_weights(o.grad_weights);
  const DeviceCopy<Row> out_rows(o.out_rows), grad_rows(o.grad_rows);
  const DeviceCopy<Token> residual(o.residual), y(o.y);
  const auto on_gpu = [&](auto& matrix) {
    const Tensor host = matrix.tensor();
    Tensor result{};
    const auto look = [&](const auto& copy, auto& original) {
      if (original.tensor().data == host.data) result = copy.tensor();
    };
    look(topk_idx, o.topk_idx), look(counts, o.counts), look(offsets, o.offsets), look(slots, o.slots);
    look(sources, o.sources), look(needed, o.needed), look(x, o.x), look(rows, o.rows), look(x_scales, o.x_scales);
    look(unquantized, o.unquantized);
    look(row_scales, o.row_scales), look(weights, o.weights), look(grad_weights, o.grad_weights);
    look(out_rows, o.out_rows), look(grad_rows, o.grad_rows), look(residual, o.residual), look(y, o.y);
    return result;
  };
  run(o, on_gpu);
  const auto gpu_counts = counts.download(), gpu_offsets = offsets.download(), gpu_slots = slots.download(),
             gpu_sources = sources.download(), gpu_needed = needed.download();
  const auto gpu_x = x.download(), gpu_rows = rows.download();
  const auto gpu_x_scales = x_scales.download(), gpu_scales = row_scales.download();
  const auto gpu_grad_weights = grad_weights.download();
  const auto gpu_y = y.download();
  const auto gpu_grad_rows = grad_rows.download();

  run(o, [](auto& matrix) { return matrix.tensor(); });
  ASSERT_TRUE(gpu_counts.same_bytes(o.counts) && gpu_offsets.same_bytes(o.offsets) && gpu_needed.same_bytes(o.needed));
  ASSERT_TRUE(gpu_slots.same_bytes(o.slots) && gpu_sources.same_bytes(o.sources));
  ASSERT_TRUE(gpu_x.same_bytes(o.x) && gpu_x_scales.same_bytes(o.x_scales));
  ASSERT_TRUE(gpu_rows.same_bytes(o.rows));
  ASSERT_TRUE(gpu_scales.same_bytes(o.row_scales));
  ASSERT_TRUE(gpu_y.same_bytes(o.y));
  ASSERT_TRUE(gpu_grad_rows.same_bytes(o.grad_rows));
  for (int t = 0; t < layer.tokens; ++t)
    for (int k = 0; k < layer.topk; ++k)
      ASSERT_NEAR(gpu_grad_weights.at(t, k), o.grad_weights.at(t, k), 1e-4 * layer.hidden) << t << ", " << k;
}

TEST_F(OnGpu, TokensToExpertsAndBackGiveTheBytesOfTheCpu) {
  std::mt19937 rng(kSeed);
  const Layer layers[] = {
      {.tokens = 1, .experts = 1, .topk = 4, .hidden = 16, .how = Layer::fused},
      {.tokens = 33, .experts = 7, .topk = 8, .hidden = 1040, .how = Layer::fused},
      {.tokens = 33, .experts = 7, .topk = 8, .hidden = 1040, .alignment = 16},
      {.tokens = 40, .experts = 300, .topk = 4, .hidden = 400, .max_rows = 2, .how = Layer::fused},
      {.tokens = 40, .experts = 9, .topk = 12, .hidden = 400, .capacity = 100, .how = Layer::fused},
      {.tokens = 1500, .experts = 20, .topk = 8, .hidden = 144, .alignment = 8},  // routed by a cluster
      {.tokens = 1, .experts = 3, .topk = 4, .hidden = 16, .how = Layer::quantized},
      {.tokens = 33, .experts = 7, .topk = 8, .hidden = 4112, .alignment = 16, .how = Layer::quantized},
      {.tokens = 150, .experts = 30, .topk = 8, .hidden = 400, .max_rows = 50, .how = Layer::quantized},
      {.tokens = 400, .experts = 20, .topk = 8, .hidden = 144, .how = Layer::quantized},  // too many for one kernel
  };
  for (const Layer& layer : layers) {
    SCOPED_TRACE(::testing::Message() << layer.tokens << " tokens, " << layer.experts << " experts, way " << layer.how);
    check_layer<cpu::Bf16, cpu::Bf16>(layer, rng);
    check_layer<cpu::Bf16, float>(layer, rng);
    check_layer<float, cpu::Bf16>(layer, rng);
    check_layer<float, float>(layer, rng);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace phalanx::test
