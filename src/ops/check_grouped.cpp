// Arguments of the grouped products and of the weight gradients.
#include <fmt/format.h>

#include "device/gemm/config.h"
#include "ops/check.h"
#include "ops/check_tensor.h"

namespace phalanx {
namespace {

using std::int64_t;

int64_t scale_blocks(int64_t n) { return ceil_div<int64_t>(n, kScaleBlock); }

struct Operands {
  const Arg &a, &sfa, &b, &sfb, &groups, &d;

  void check_ranks(int of_a, int of_b, int of_d) const {
    check_rank(a, of_a), check_rank(sfa, of_a);
    check_rank(b, of_b), check_rank(sfb, of_b);
    check_rank(groups, 1), check_rank(d, of_d);
    for (const Arg* arg : {&sfa, &b, &sfb, &groups, &d}) check_device(*arg, a);
    for (const Arg* arg : {&a, &b}) check_dtype(*arg, DType::e4m3);
    for (const Arg* arg : {&sfa, &sfb}) check_dtype(*arg, DType::f32);
  }
  void check_memory() const {
    check_scales(sfa, Access::read);
    check_scales(sfb, Access::read);
    for (const Arg* input : {&a, &sfa, &b, &sfb, &groups}) check_disjoint(d, *input);
  }
};

}  // namespace

void check_grouped_gemm(const char* op, GroupsBy by, const ScaledTensor& a, const ScaledTensor& b, const Tensor& groups,
                        const Tensor& d, const GroupedGemmOptions& options) {
  constexpr const char* kNames[] = {"offsets", "row_groups", "counts"};
  const Arg a_data{op, "a.data", a.data}, a_scales{op, "a.scales", a.scales}, b_data{op, "b.data", b.data},
      b_scales{op, "b.scales", b.scales}, of_groups{op, kNames[int(by)], groups}, out{op, "d", d};
  const Operands all{a_data, a_scales, b_data, b_scales, of_groups, out};
  const bool masked = by == GroupsBy::counts;
  all.check_ranks(masked ? 3 : 2, 3, masked ? 3 : 2);
  check_dtype(out, {DType::bf16, DType::f32});

  const int64_t g = b.data.shape[0], n = b.data.shape[1], k = b.data.shape[2], k_blocks = scale_blocks(k);
  check_num_groups(b_data);
  check_at_least_1(b_data, "N", n);
  check_at_least_1(b_data, "K", k);
  check_shape(b_scales, {g, scale_blocks(n), k_blocks}, "[G, ceil(N / 128), ceil(K / 128)]");
  check_stack(b_data);
  if (masked) {
    const int64_t rows = a.data.shape[1];
    check_shape(a_data, {g, rows, k}, "[G, R, K] with the G and K of b.data");
    check_shape(a_scales, {g, rows, k_blocks}, "[G, R, ceil(K / 128)]");
    check_shape(out, {g, rows, n}, "[G, R, N]");
    check_groups_vector(of_groups, g, "[G]");
    check_stack(a_data);
    check_stack(out);
  } else {
    const int64_t rows = a.data.shape[0];
    check_shape(a_data, {rows, k}, "[M, K] with the K of b.data");
    check_shape(a_scales, {rows, k_blocks}, "[M, ceil(K / 128)]");
    check_shape(out, {rows, n}, "[M, N]");
    if (by == GroupsBy::offsets)
      check_groups_vector(of_groups, g + 1, "[G + 1]");
    else
      check_groups_vector(of_groups, rows, "[M]");
    check_tma(a_data);
    check_tma(out);
  }
  all.check_memory();
  check_not_negative(op, "num_sms", options.num_sms);
  check_not_negative(op, "expected_rows", options.expected_rows);
}

void check_grouped_swiglu(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const ScaledTensor& q,
                          const GroupedSwigluOptions& options) {
  constexpr const char* kOp = "grouped_gemm_fp8_swiglu";
  const Arg a_data{kOp, "a.data", a.data}, a_scales{kOp, "a.scales", a.scales}, b_data{kOp, "b.data", b.data},
      b_scales{kOp, "b.scales", b.scales}, of_groups{kOp, "offsets", offsets}, out{kOp, "q.data", q.data},
      out_scales{kOp, "q.scales", q.scales};
  const Operands all{a_data, a_scales, b_data, b_scales, of_groups, out};
  all.check_ranks(2, 3, 2);
  check_dtype(out, DType::e4m3);
  check_rank(out_scales, 2);
  check_device(out_scales, a_data);
  check_dtype(out_scales, DType::f32);

  const int64_t m = a.data.rows(), g = b.data.shape[0], n = b.data.shape[1], k = b.data.shape[2];
  check_num_groups(b_data);
  check_at_least_1(b_data, "K", k);
  if (n == 0 || n % (2 * kScaleBlock) != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, b_data,
         "N is {}, expected a multiple of 256: gates and ups, each a multiple of 128", n);
  check_shape(b_scales, {g, n / kScaleBlock, scale_blocks(k)}, "[G, 2 I / 128, ceil(K / 128)]");
  check_shape(a_data, {m, k}, "[M, K] with the K of b.data");
  check_shape(a_scales, {m, scale_blocks(k)}, "[M, ceil(K / 128)]");
  check_groups_vector(of_groups, g + 1, "[G + 1]");
  check_shape(out, {m, n / 2}, "[M, I], half the N of b.data");
  check_shape(out_scales, {m, n / 2 / kScaleBlock}, "one scale per 1 x 128 block");
  check_stack(b_data);
  check_tma(a_data);
  check_tma(out);
  check_scales(out_scales, Access::write);
  all.check_memory();
  for (const Arg* arg : {&a_data, &a_scales, &b_data, &b_scales, &of_groups, &out}) check_disjoint(out_scales, *arg);
  if (!(options.limit > 0)) [[unlikely]]
    throw Error(ErrorCode::invalid_argument,
                format_text("{}: options.limit is {}, expected more than 0", kOp, options.limit));
  if (options.weights) {
    const Arg weights{kOp, "options.weights", *options.weights};
    check_rank(weights, 1);
    check_device(weights, a_data);
    check_dtype(weights, DType::f32);
    check_shape(weights, {m}, "[M], one for each row of a.data");
    check_base(weights, alignof(float));
    check_disjoint(out, weights), check_disjoint(out_scales, weights);
  }
  if (options.gates_and_ups) {
    const Arg room{kOp, "options.gates_and_ups", *options.gates_and_ups};
    check_rank(room, 2);
    check_device(room, a_data);
    check_dtype(room, DType::bf16);
    check_shape(room, {m, n}, "[M, 2 I]");
    check_tma(room);
    for (const Arg* arg : {&a_data, &a_scales, &b_data, &b_scales, &of_groups, &out, &out_scales})
      check_disjoint(room, *arg);
    if (options.weights) check_disjoint(room, {kOp, "options.weights", *options.weights});
  }
  check_not_negative(kOp, "num_sms", options.num_sms);
  check_not_negative(kOp, "expected_rows", options.expected_rows);
}

void check_wgrad(const char* op, const ScaledTensor& a, const ScaledTensor& b, const Tensor* offsets, const Tensor& d,
                 const WgradOptions& options) {
  const Tensor none{.dtype = DType::int32, .device = a.data.device, .ndim = 1};
  const Arg a_data{op, "a.data", a.data}, a_scales{op, "a.scales", a.scales}, b_data{op, "b.data", b.data},
      b_scales{op, "b.scales", b.scales}, of_groups{op, "offsets", offsets ? *offsets : none}, out{op, "d", d};
  const Operands all{a_data, a_scales, b_data, b_scales, of_groups, out};
  all.check_ranks(2, 2, offsets ? 3 : 2);
  check_dtype(out, DType::f32);

  const int64_t m = a.data.rows(), n = b.data.rows(), k = a.data.cols(), k_blocks = scale_blocks(k);
  check_at_least_1(a_data, "M", m);
  check_at_least_1(b_data, "N", n);
  check_shape(b_data, {n, k}, "[N, K] with the K of a.data");
  check_shape(a_scales, {m, k_blocks}, "[M, ceil(K / 128)]");
  check_shape(b_scales, {n, k_blocks}, "[N, ceil(K / 128)]");
  check_tma(a_data);
  check_tma(b_data);
  if (offsets) {
    const int64_t g = d.shape[0];
    check_num_groups(out);
    check_shape(out, {g, m, n}, "[G, M, N]");
    check_groups_vector(of_groups, g + 1, "[G + 1] with the G of d");
    check_stack(out);
  } else {
    check_shape(out, {m, n}, "[M, N]");
    check_tma(out);
  }
  all.check_memory();
  check_not_negative(op, "num_sms", options.num_sms);
}

}  // namespace phalanx
