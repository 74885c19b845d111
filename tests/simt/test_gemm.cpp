// The kernels of products, simulated on the host: the bits of the CPU backend, and nothing written beside them.
//
// Operands are small integers, scales powers of two: every sum is exact in every order.
#include "simt.h"  // first: what CUDA C++ is to the device code

#include <gtest/gtest.h>

#include <array>
#include <random>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/gemm_bf16.h"
#include "device/gemm/gemm_bf16.cuh"
#include "device/gemm/gemm_fp8.cuh"
#include "device/gemm/gemm_fp8_few.cuh"
#include "device/gemm/gemm_fp8_wgrad.cuh"
#include "ops/check.h"
#include "ops/check_bf16.h"
#include "plan/plan.h"
#include "tests/cpu/matrix.h"
#include "tests/simt/tensors.h"

namespace phalanx::test {
namespace {

struct Shape {
  int m, n, k;
};

cpu::E4m3 small_integer(std::mt19937& rng) { return {std::uint8_t(nearest_e4m3(int(rng() % 5) - 2))}; }

template <GemmConfig C>
void check_gemm(const Shape& shape, bool with_c, Order sfa_order, std::mt19937& rng) {
  using T = typename Conditional<C.out == OutType::bf16, cpu::Bf16, float>::Type;
  const auto& [m, n, k] = shape;
  SCOPED_TRACE(::testing::Message() << m << "x" << n << "x" << k << (with_c ? " with C" : "") << ", tile " << C.block_m
                                    << "x" << C.block_n << ", split " << C.split_k);
  const int k_blocks = ceil_div(k, 128);
  const auto integer = [&](auto, auto) { return small_integer(rng); };
  const auto power = [&](auto, auto) { return std::array{1.0f, 0.5f, -1.0f, 0.0f}[rng() % 4]; };  // sums of -0, too
  Matrix<cpu::E4m3> a(m, k, 1), b(n, k, 1);
  Matrix<float> sfa(m, k_blocks, 0, sfa_order), sfb(ceil_div(n, 128), k_blocks);
  Matrix<T> c(m, n, 1), d(m, n, 2), expected(m, n, 2);
  a.fill(integer), b.fill(integer), sfa.fill(power), sfb.fill(power);
  c.fill([&](auto, auto) { return cpu::from_f32<T>(float(int(rng() % 17) - 8)); });

  const Tensor in_a = a.tensor(), in_b = b.tensor(), in_c = c.tensor(), out = d.tensor();
  const Tensor scales_a = sfa.tensor(), scales_b = sfb.tensor();
  const plan::GemmPlan plan = plan::plan_with(C, 8, {.m = m, .n = n, .k = k, .out = C.out}, 4);
  GemmParams p{};
  constexpr int kSlice = C.block_m / C.cluster_n;
  p.rows_a = std::min(C.block_m, m), p.streams_b = with_c;
  p.a = tensor_map(in_a, std::min(kSlice, m), kBlockK);
  p.a_last = m % kSlice != 0 && m > kSlice ? tensor_map(in_a, m % kSlice, kBlockK) : p.a;
  p.b = tensor_map(in_b, C.block_n / C.cluster_m, kBlockK);
  if (C.stores_by_tma()) p.d = tensor_map(out, C.consumer_rows(), C.panel_columns());
  if (C.stores_by_tma() && with_c) p.c = tensor_map(in_c, C.consumer_rows(), C.panel_columns());
  p.sfa_by_tma = sfa_order == Order::col_major;
  if (p.sfa_by_tma) {
    const Tensor columns = transposed(scales_a);
    p.sfa_map = tensor_map(columns, 1, C.block_m, false);
  }
  p.sfa = static_cast<const float*>(scales_a.data), p.sfb = static_cast<const float*>(scales_b.data);
  p.sfa_stride_m = scales_a.strides[0], p.sfa_stride_k = scales_a.strides[1];
  p.sfb_stride_n = scales_b.strides[0], p.sfb_stride_k = scales_b.strides[1];
  p.constant_b = with_c;
  p.d_ptr = out.data, p.d_stride = row_stride(out);
  if (with_c) p.c_ptr = in_c.data, p.c_stride = row_stride(in_c);
  p.m = m, p.n = n, p.k = k, p.group_m = plan.group_m;
  simt::launch(
      plan.num_ctas, C.num_threads(),
      [&] {
        if constexpr (C.few_rows())
          gemm_fp8_few<C>(p);
        else
          gemm_fp8<C>(p);
      },
      C.cluster_size());
  cpu::gemm_fp8({in_a, scales_a}, {in_b, scales_b}, expected.tensor(), with_c ? &in_c : nullptr);
  ASSERT_TRUE(d.same_bytes(expected)) << "the bits of the CPU's result, and poison all around it";
}

template <GemmConfig C>
void check_shapes(std::initializer_list<Shape> shapes) {
  std::mt19937 rng(kSeed);
  for (const Shape& shape : shapes) {
    check_gemm<C>(shape, false, Order::col_major, rng);
    check_gemm<C>(shape, true, Order::row_major, rng);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TEST(SimulatedGemm, OfFewRows) {
  check_shapes<{.block_m = 8, .block_n = 64, .num_stages = 4}>(
      {{1, 1, 1}, {3, 40, 100}, {8, 200, 1700}, {7, 130, 128}});
  check_shapes<{.block_m = 8, .block_n = 64, .num_consumers = 3, .num_stages = 6, .split_k = 2, .out = OutType::f32}>(
      {{1, 64, 100}, {5, 130, 1700}});
  check_shapes<{.block_m = 16, .block_n = 64, .num_stages = 4, .split_k = 4}>({{9, 129, 300}, {16, 72, 2000}});
  check_shapes<{.block_m = 16, .block_n = 64, .num_consumers = 1, .num_stages = 3, .split_k = 8}>(
      {{11, 66, 2500}, {16, 64, 300}});
}

TEST(SimulatedGemm, OfManyRows) {
  check_shapes<{.block_m = 128, .block_n = 128, .num_stages = 3}>({{1, 1, 1}, {130, 200, 1000}});
  check_shapes<{.block_m = 256, .block_n = 128, .num_stages = 3, .cluster_n = 2}>({{300, 264, 500}});
  check_shapes<{.block_m = 192, .block_n = 128, .num_consumers = 3, .num_stages = 3, .cluster_n = 2}>(
      {{200, 264, 500}});
  check_shapes<{.block_m = 128, .block_n = 192, .num_stages = 3, .cluster_m = 2}>({{270, 200, 500}});
  check_shapes<{.block_m = 192, .block_n = 96, .num_consumers = 3, .num_stages = 3}>({{200, 200, 500}});
  check_shapes<{.block_m = 64, .block_n = 64, .num_consumers = 1, .num_stages = 3}>({{70, 129, 129}, {33, 200, 4500}});
  check_shapes<{.block_m = 64, .block_n = 16, .num_consumers = 1, .num_stages = 4, .out = OutType::f32}>(
      {{70, 51, 700}});
  check_shapes<{.block_m = 64, .block_n = 64, .num_consumers = 1, .num_stages = 3, .split_k = 4, .out = OutType::f32}>(
      {{70, 129, 1900}});
}

// --- groups ----------------------------------------------------------------------------------------------------------

const std::vector<int> kOffsets = {3, 6, 6, 136, 137, 201, 330, 330};
constexpr int kGroups = 7, kRows = 340;  // the last ones are of no group

Tensor offsets() { return {const_cast<int*>(kOffsets.data()), DType::int32, {}, 1, {kGroups + 1}, {1}}; }

/// A's or B's scales as TMA reads them.
TensorMap scale_map(const Tensor& scales, int box) { return tensor_map(transposed(scales), 1, box, false); }

template <GemmConfig C>
void run_groups(GemmParams& p, int limit, int clusters = 3) {
  u64 fault = 0;
  p.groups.bounds = kOffsets.data(), p.groups.fault = &fault, p.groups.by = GroupsBy::offsets;
  p.groups.num_groups = kGroups, p.groups.limit = limit, p.groups.one_tile_each = p.streams_b = 1;
  p.group_m = 8;
  simt::launch(
      clusters * C.cluster_size(), C.num_threads(),
      [&] {
        if constexpr (C.operand == Operand::bf16)
          gemm_bf16<C>(p);
        else if constexpr (C.grouping == Grouping::columns)
          wgrad_fp8<C>(p);
        else
          gemm_fp8<C>(p);
      },
      C.cluster_size());
  ASSERT_EQ(fault, 0u);
}

template <GemmConfig C>
void check_rows(Order sfa_order, int k = 400, int clusters = 3) {
  constexpr int kN = 200;
  const int k_blocks = ceil_div(k, kBlockK);
  SCOPED_TRACE(::testing::Message() << "groups of rows, tile " << C.block_m << "x" << C.block_n << ", k " << k);
  std::mt19937 rng(kSeed);
  const auto power = [&](auto, auto) { return rng() % 2 ? 1.0f : 0.5f; };
  Matrix<cpu::E4m3> a(kRows, k, 1), b(kGroups * kN, k, 1);
  Matrix<float> sfa(kRows, k_blocks, 0, sfa_order), sfb(kGroups * 2, k_blocks);
  Matrix<cpu::Bf16> d(kRows, kN, 2), expected(kRows, kN, 2);
  const auto integer = [&](auto, auto) { return small_integer(rng); };
  a.fill(integer), b.fill(integer), sfa.fill(power), sfb.fill(power);
  const Tensor scales_a = sfa.tensor(), scales_b = stack(sfb.tensor(), kGroups), out = d.tensor();
  GemmParams p{};
  p.rows_a = C.block_m;
  p.a = tensor_map(a.tensor(), C.block_m / C.cluster_n, kBlockK);
  p.a_last = tensor_map(a.tensor(), C.rows_of_request(), kBlockK);
  p.b = tensor_map(b.tensor(), C.block_n / C.cluster_m, kBlockK);
  p.d = tensor_map(out, C.consumer_rows(), C.panel_columns());
  p.sfa_by_tma = sfa_order == Order::col_major;
  if (p.sfa_by_tma) p.sfa_map = scale_map(scales_a, C.scales_a_box());
  p.sfa = static_cast<const float*>(scales_a.data), p.sfb = static_cast<const float*>(scales_b.data);
  p.sfa_stride_m = scales_a.strides[0], p.sfa_stride_k = scales_a.strides[1];
  p.sfb_stride_n = scales_b.strides[1], p.sfb_stride_k = scales_b.strides[2];
  p.d_ptr = out.data, p.d_stride = row_stride(out);
  p.m = kRows, p.n = kN, p.k = k;
  p.groups.b_pitch = kN, p.groups.sfb_stride_g = scales_b.strides[0];
  run_groups<C>(p, kRows, clusters);
  cpu::grouped_gemm_fp8({a.tensor(), scales_a}, {stack(b.tensor(), kGroups), scales_b}, offsets(), expected.tensor());
  ASSERT_TRUE(d.same_bytes(expected)) << "the bits of the CPU's result, and poison in rows of no group";
}

template <GemmConfig C>
void check_gradients(bool accumulate, Order order = Order::col_major) {
  constexpr int kM = 150, kN = 200;
  SCOPED_TRACE(::testing::Message() << "gradients, tile " << C.block_m << "x" << C.block_n);
  std::mt19937 rng(kSeed);
  const auto power = [&](auto, auto) { return rng() % 2 ? 1.0f : 0.5f; };
  const auto integer = [&](auto, auto) { return small_integer(rng); };
  const auto bf16 = [&](auto, auto) { return cpu::from_f32<cpu::Bf16>(float(int(rng() % 9) - 4)); };
  Matrix<float> d(kGroups * kM, kN, 1), expected = d;
  if (accumulate) d.fill([&](auto, auto) { return float(rng() % 9); }), expected = d;
  const Tensor out = d.tensor();
  GemmParams p{};
  p.rows_a = C.block_m;
  p.d = tensor_map(out, 64, kGradientColumns);
  p.d_ptr = out.data, p.d_stride = row_stride(out);
  if (accumulate) p.c_ptr = out.data, p.c_stride = p.d_stride;
  p.m = kM, p.n = kN, p.k = kRows;
  p.groups.d_pitch = kM;
  if constexpr (C.operand == Operand::bf16) {
    Matrix<cpu::Bf16> a(kRows, kM, 1), b(kRows, kN, 1);
    a.fill(bf16), b.fill(bf16);
    p.a = tensor_map(a.tensor(), kBf16BlockK, kPanelRows), p.b = tensor_map(b.tensor(), kBf16BlockK, kPanelRows);
    run_groups<C>(p, kRows);
    cpu::grouped_wgrad_bf16(a.tensor(), b.tensor(), offsets(), stack(expected.tensor(), kGroups), accumulate);
  } else {
    constexpr int kKBlocks = ceil_div(kRows, kBlockK);
    Matrix<cpu::E4m3> a(kM, kRows, 1), b(kN, kRows, 1);
    Matrix<float> sfa(kM, kKBlocks, 0, order), sfb(kN, kKBlocks, 0, order);
    a.fill(integer), b.fill(integer), sfa.fill(power), sfb.fill(power);
    const Tensor scales_a = sfa.tensor(), scales_b = sfb.tensor();
    p.a = tensor_map(a.tensor(), C.block_m / C.cluster_n, kBlockK);
    p.b = tensor_map(b.tensor(), C.block_n / C.cluster_m, kBlockK);
    p.sfa_by_tma = order == Order::col_major;
    if (p.sfa_by_tma) p.sfa_map = scale_map(scales_a, C.scales_a_box()), p.sfb_map = scale_map(scales_b, C.block_n);
    p.sfa = static_cast<const float*>(scales_a.data), p.sfb = static_cast<const float*>(scales_b.data);
    p.sfa_stride_m = scales_a.strides[0], p.sfa_stride_k = scales_a.strides[1];
    p.sfb_stride_n = scales_b.strides[0], p.sfb_stride_k = scales_b.strides[1];
    run_groups<C>(p, kRows);
    cpu::grouped_wgrad_fp8({a.tensor(), scales_a}, {b.tensor(), scales_b}, offsets(), stack(expected.tensor(), kGroups),
                           accumulate);
  }
  ASSERT_TRUE(d.same_bytes(expected));
}

TEST(SimulatedGemm, OfGroups) {
  constexpr GemmConfig kTile{.block_m = 128, .block_n = 128, .num_stages = 3, .grouping = Grouping::rows};
  constexpr GemmConfig kTall{
      .block_m = 192, .block_n = 128, .num_consumers = 3, .num_stages = 3, .cluster_n = 2, .grouping = Grouping::rows};
  constexpr GemmConfig kTwoWaves{
      .block_m = 256, .block_n = 128, .num_stages = 3, .cluster_n = 2, .grouping = Grouping::rows};
  constexpr GemmConfig kWide{.block_m = 128, .block_n = 192, .num_stages = 2, .grouping = Grouping::rows};
  constexpr GemmConfig kLow{
      .block_m = 64, .block_n = 64, .num_consumers = 1, .num_stages = 8, .grouping = Grouping::rows};
  check_rows<kLow>(Order::col_major);
  check_rows<kLow>(Order::row_major, 100, 1);  // stages for more tiles than the ring has places
  check_rows<kTile>(Order::col_major);
  check_rows<kTile>(Order::row_major);
  check_rows<kTall>(Order::col_major);
  check_rows<kTwoWaves>(Order::row_major);
  check_rows<kWide>(Order::col_major);
}

TEST(SimulatedGemm, OfGradients) {
  constexpr GemmConfig kTile{
      .block_m = 128, .block_n = 128, .num_stages = 3, .out = OutType::f32, .grouping = Grouping::columns};
  constexpr GemmConfig kSharedA = [&](GemmConfig c) { return c.cluster_n = 2, c; }(kTile);
  constexpr GemmConfig kSharedB = [&](GemmConfig c) { return c.cluster_m = 2, c; }(kTile);
  constexpr GemmConfig kBf16{.block_m = 128,
                             .block_n = 128,
                             .num_stages = 3,
                             .out = OutType::f32,
                             .grouping = Grouping::columns,
                             .operand = Operand::bf16,
                             .major_a = Major::mn,
                             .major_b = Major::mn};
  for (const bool accumulate : {false, true}) {
    check_gradients<kTile>(accumulate);
    check_gradients<kTile>(accumulate, Order::row_major);
    check_gradients<kSharedA>(accumulate);
    check_gradients<kSharedB>(accumulate);
    check_gradients<kBf16>(accumulate);
  }
}

// --- BF16 -----------------------------------------------------------------------------------------------------------

template <Major kMajorA, Major kMajorB>
void check_bf16(int m, int n, int k) {
  constexpr GemmConfig C{.block_m = 128,
                         .block_n = 128,
                         .num_stages = 3,
                         .cluster_n = 2,
                         .operand = Operand::bf16,
                         .major_a = kMajorA,
                         .major_b = kMajorB};
  SCOPED_TRACE(::testing::Message() << "BF16, " << m << "x" << n << "x" << k << ", majors " << int(kMajorA)
                                    << int(kMajorB));
  std::mt19937 rng(kSeed);
  const auto make = [&](int rows, Major major) {
    Matrix<cpu::Bf16> x(rows, k, 1, major == Major::k ? Order::row_major : Order::col_major);
    x.fill([&](auto, auto) { return cpu::from_f32<cpu::Bf16>(float(int(rng() % 9) - 4)); });
    return x;
  };
  const auto map = [](const Tensor& t, Major major, int rows) {
    return major == Major::k ? tensor_map(t, rows, kBf16BlockK) : tensor_map(transposed(t), kBf16BlockK, kPanelRows);
  };
  auto a = make(m, kMajorA), b = make(n, kMajorB);
  Matrix<cpu::Bf16> d(m, n, 2), expected(m, n, 2);
  const Tensor out = d.tensor();
  GemmParams p{};
  p.rows_a = C.block_m;
  p.a = map(a.tensor(), kMajorA, C.block_m / C.cluster_n);
  p.b = map(b.tensor(), kMajorB, C.block_n / C.cluster_m);
  p.d = tensor_map(out, C.consumer_rows(), C.panel_columns());
  p.d_ptr = out.data, p.d_stride = row_stride(out);
  p.m = m, p.n = n, p.k = k, p.group_m = 8;
  simt::launch(
      4, C.num_threads(), [&] { gemm_bf16<C>(p); }, C.cluster_size());
  cpu::gemm_bf16(a.tensor(), b.tensor(), expected.tensor(), nullptr, false);
  ASSERT_TRUE(d.same_bytes(expected));
}

TEST(SimulatedGemm, OfBf16) {
  check_bf16<Major::k, Major::k>(200, 300, 500);
  check_bf16<Major::mn, Major::k>(130, 129, 200);
  check_bf16<Major::k, Major::mn>(130, 264, 200);
  check_bf16<Major::mn, Major::mn>(136, 200, 330);
}

}  // namespace
}  // namespace phalanx::test
