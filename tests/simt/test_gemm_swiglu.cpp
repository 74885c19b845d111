// The product of gates and ups with SwiGLU in its epilogue, simulated on the host: the bytes of the CPU's product and
// of its SwiGLU, one after the other, and nothing written beside them.
//
// Operands are small integers, scales powers of two: every sum is exact in every order.
#include "simt.h"  // first: what CUDA C++ is to the device code

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "cpu/cpu.h"
#include "device/moe/gemm_swiglu.cuh"
#include "ops/check.h"
#include "ops/check_bf16.h"
#include "ops/scaled_matrix.h"
#include "tests/cpu/matrix.h"
#include "tests/simt/tensors.h"

namespace phalanx::test {
namespace {

struct Epilogue {
  Order sfa_order;
  bool weighted, pow2;
  float limit;
};

template <GemmConfig C>
void check(int intermediate, int k, const std::vector<int>& offsets, const Epilogue& epilogue, std::mt19937& rng) {
  const int groups = int(offsets.size()) - 1, rows = offsets.back() + 10, n = 2 * intermediate;
  const int k_blocks = ceil_div(k, 128), columns = intermediate / 128;
  SCOPED_TRACE(::testing::Message() << "tile " << C.block_m << "x" << C.block_n << ", " << rows << " rows, "
                                    << intermediate << " of " << k);
  Matrix<cpu::E4m3> a(rows, k, 1), b(groups * n, k, 1), q(rows, intermediate, 1), expected = q;
  Matrix<float> sfa(rows, k_blocks, 0, epilogue.sfa_order), sfb(groups * 2 * columns, k_blocks), weights(rows, 1);
  Matrix<float> scales(rows, columns, 1, Order::col_major), expected_scales = scales;
  Matrix<cpu::Bf16> x(rows, n);
  const auto integer = [&](auto, auto) { return cpu::E4m3{std::uint8_t(nearest_e4m3(int(rng() % 5) - 2))}; };
  a.fill(integer), b.fill(integer);
  // Of most rows gates are around 1; of some so large that they overflow BF16, or FP32 when they meet their ups.
  const auto power = [&](int exponent) { return std::ldexp(1.0f, exponent + int(rng() % 2)); };
  sfa.fill([&](auto i, auto) { return power(i % 17 == 4 ? 124 : i % 19 == 5 ? 58 : -3); });
  sfb.fill([&](auto, auto) { return power(-3); });
  weights.fill([&](auto, auto) { return 0.25f * float(rng() % 7); });
  a.at(offsets[0] + 7, k / 2) = cpu::E4m3{0x7f};

  const Tensor scales_a = sfa.tensor(), scales_b = stack(sfb.tensor(), groups), w = weights.tensor();
  const ScaledTensor out{q.tensor(), scales.tensor()};
  u64 fault = 0;
  GemmSwigluParams p{};
  p.gemm.rows_a = C.block_m;
  p.gemm.a = tensor_map(a.tensor(), C.rows_of_request(), kBlockK);
  p.gemm.b = tensor_map(b.tensor(), C.block_n / 2, kBlockK);
  p.gemm.sfa_by_tma = epilogue.sfa_order == Order::col_major;
  if (p.gemm.sfa_by_tma) p.gemm.sfa_map = tensor_map(transposed(scales_a), 1, C.scales_a_box(), false);
  p.gemm.sfa = static_cast<const float*>(scales_a.data), p.gemm.sfb = static_cast<const float*>(scales_b.data);
  p.gemm.sfa_stride_m = scales_a.strides[0], p.gemm.sfa_stride_k = scales_a.strides[1];
  p.gemm.sfb_stride_n = scales_b.strides[1], p.gemm.sfb_stride_k = scales_b.strides[2];
  p.gemm.m = rows, p.gemm.n = n, p.gemm.k = k, p.gemm.group_m = 8, p.gemm.streams_b = epilogue.weighted;
  p.gemm.groups = {.bounds = offsets.data(),
                   .fault = &fault,
                   .by = GroupsBy::offsets,
                   .num_groups = groups,
                   .limit = rows,
                   .b_pitch = n,
                   .sfb_stride_g = scales_b.strides[0],
                   .one_tile_each = 1};
  p.q = scaled_matrix(out);
  if (epilogue.weighted) p.weights = static_cast<const float*>(w.data), p.weight_stride = w.strides[0];
  p.limit = epilogue.limit, p.pow2_scales = epilogue.pow2;
  constexpr int kClusters = 2;
  simt::launch(
      kClusters * C.cluster_size(), C.num_threads(), [&] { gemm_swiglu<C>(p); }, C.cluster_size());
  ASSERT_EQ(fault, 0u);

  const Tensor bounds{const_cast<int*>(offsets.data()), DType::int32, {}, 1, {groups + 1}, {1}};
  cpu::grouped_gemm_fp8({a.tensor(), scales_a}, {stack(b.tensor(), groups), scales_b}, bounds, x.tensor());
  const auto of_groups = [&](Tensor t) {  // rows of no group stay as they are
    t.data = static_cast<char*>(t.data) + offsets[0] * t.strides[0] * size_of(t.dtype);
    t.shape[0] = offsets.back() - offsets[0];
    return t;
  };
  SwigluOptions options{.limit = epilogue.limit, .pow2_scales = epilogue.pow2};
  if (epilogue.weighted) {
    options.weights = of_groups(w);
    options.weights->ndim = 1;
  }
  cpu::swiglu_quantize(of_groups(x.tensor()), {of_groups(expected.tensor()), of_groups(expected_scales.tensor())},
                       options);
  ASSERT_TRUE(scales.same_bytes(expected_scales));
  ASSERT_TRUE(q.same_bytes(expected));
}

constexpr GemmConfig tile(int block_m, int num_consumers, int num_stages) {
  return {.block_m = block_m,
          .block_n = 128,
          .num_consumers = num_consumers,
          .num_stages = num_stages,
          .cluster_n = 2,
          .out = OutType::swiglu,
          .grouping = Grouping::rows};
}

TEST(SimulatedGemmSwiglu, GivesTheBytesOfBothSteps) {
  std::mt19937 rng(kSeed);
  const std::vector<int> ragged = {3, 3, 136, 137, 201, 330, 330};
  constexpr float kInfinity = INFINITY;
  check<tile(64, 1, 3)>(256, 400, ragged, {Order::col_major, false, false, kInfinity}, rng);
  check<tile(64, 1, 4)>(128, 100, {0, 1, 1, 30}, {Order::row_major, true, true, 7.0f}, rng);
  check<tile(128, 2, 3)>(384, 300, ragged, {Order::col_major, true, false, 7.0f}, rng);
  check<tile(192, 3, 3)>(256, 400, ragged, {Order::col_major, true, false, kInfinity}, rng);
  check<tile(192, 3, 2)>(128, 520, {2, 260, 600}, {Order::row_major, false, true, 0.5f}, rng);
}

}  // namespace
}  // namespace phalanx::test
