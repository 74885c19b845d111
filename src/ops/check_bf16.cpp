#include "ops/check_bf16.h"

#include <utility>

#include "ops/check.h"
#include "ops/check_tensor.h"

namespace phalanx {

using std::int64_t;

Tensor transposed(const Tensor& x) {
  Tensor t = x;
  std::swap(t.shape[x.ndim - 2], t.shape[x.ndim - 1]);
  std::swap(t.strides[x.ndim - 2], t.strides[x.ndim - 1]);
  return t;
}

Major major_of(const Tensor& x) {
  const int rows = x.ndim - 2, cols = x.ndim - 1;
  const auto along = [&](int inner, int outer) {  // a dimension of size 1 has any stride
    return (x.shape[inner] == 1 || x.strides[inner] == 1) &&
           (x.shape[outer] == 1 || x.strides[outer] * size_of(x.dtype) % 16 == 0);
  };
  if (along(cols, rows)) return Major::k;
  return along(rows, cols) || (x.strides[rows] == 1 && x.strides[cols] != 1) ? Major::mn : Major::k;
}

namespace {

/// Either major. What is wrong with an MN-major operand is said of its transpose, whose rows are contiguous.
void check_operand(const Arg& arg) {
  const auto check = [](const Arg& rows) { rows->ndim == 3 ? check_stack(rows) : check_tma(rows); };
  if (major_of(arg.tensor) == Major::k) return check(arg);
  const Tensor transpose = transposed(arg.tensor);
  const std::string name = std::string(arg.name) + ", transposed,";
  check({arg.op, name.c_str(), transpose});
}

/// Of all operations: `inputs` on the device of the first of them, as is the output, which overlaps none.
void check_places(std::initializer_list<const Arg*> inputs, const Arg& out) {
  const Arg& first = **inputs.begin();
  check_device(out, first);
  for (const Arg* input : inputs) check_device(*input, first);
}
void check_memory(std::initializer_list<const Arg*> inputs, const Arg& out) {
  for (const Arg* input : inputs) check_disjoint(out, *input);
}

}  // namespace

void check_gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& d, const GemmOptions& options) {
  constexpr const char* kOp = "gemm_bf16";
  const Arg of_a{kOp, "a", a}, of_b{kOp, "b", b}, out{kOp, "d", d};
  for (const Arg* arg : {&of_a, &of_b, &out}) check_matrix(*arg);
  check_places({&of_a, &of_b}, out);
  check_dtype(of_a, DType::bf16);
  check_dtype(of_b, DType::bf16);
  check_dtype(out, {DType::bf16, DType::f32});

  const int64_t m = a.rows(), k = a.cols(), n = b.rows();
  check_at_least_1(of_a, "K", k);
  check_at_least_1(of_b, "N", n);
  check_shape(of_b, {n, k}, "[N, K] with the K of a");
  check_shape(out, {m, n}, "[M, N]");
  check_operand(of_a);
  check_operand(of_b);
  check_tma(out);
  check_memory({&of_a, &of_b}, out);
  if (options.c) check_addend({kOp, "options.c", *options.c}, out, of_a);
  check_not_negative(kOp, "num_sms", options.num_sms);
}

void check_grouped_gemm_bf16(const char* op, GroupsBy by, const Tensor& a, const Tensor& b, const Tensor& groups,
                             const Tensor& d, const GroupedGemmOptions& options) {
  constexpr const char* kNames[] = {"offsets", "row_groups", "counts"};
  const Arg of_a{op, "a", a}, of_b{op, "b", b}, of_groups{op, kNames[int(by)], groups}, out{op, "d", d};
  const bool masked = by == GroupsBy::counts;
  check_rank(of_a, masked ? 3 : 2);
  check_rank(of_b, 3);
  check_rank(of_groups, 1);
  check_rank(out, masked ? 3 : 2);
  check_places({&of_a, &of_b, &of_groups}, out);
  check_dtype(of_a, DType::bf16);
  check_dtype(of_b, DType::bf16);
  check_dtype(out, {DType::bf16, DType::f32});

  const int64_t g = b.shape[0], n = b.shape[1], k = b.shape[2];
  check_num_groups(of_b);
  check_at_least_1(of_b, "N", n);
  check_at_least_1(of_b, "K", k);
  check_operand(of_b);
  if (masked) {
    const int64_t rows = a.shape[1];
    check_shape(of_a, {g, rows, k}, "[G, R, K] with the G and K of b");
    check_shape(out, {g, rows, n}, "[G, R, N]");
    check_groups_vector(of_groups, g, "[G]");
    check_stack(of_a);
    check_stack(out);
  } else {
    const int64_t rows = a.shape[0];
    check_shape(of_a, {rows, k}, "[M, K] with the K of b");
    check_shape(out, {rows, n}, "[M, N]");
    if (by == GroupsBy::offsets)
      check_groups_vector(of_groups, g + 1, "[G + 1]");
    else
      check_groups_vector(of_groups, rows, "[M]");
    check_tma(of_a);
    check_tma(out);
  }
  check_memory({&of_a, &of_b, &of_groups}, out);
  check_not_negative(op, "num_sms", options.num_sms);
  check_not_negative(op, "expected_rows", options.expected_rows);
}

void check_grouped_wgrad_bf16(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d,
                              const WgradOptions& options) {
  constexpr const char* kOp = "grouped_wgrad_bf16";
  const Arg of_a{kOp, "a", a}, of_b{kOp, "b", b}, of_offsets{kOp, "offsets", offsets}, out{kOp, "d", d};
  check_rank(of_a, 2), check_rank(of_b, 2), check_rank(of_offsets, 1), check_rank(out, 3);
  check_places({&of_a, &of_b, &of_offsets}, out);
  check_dtype(of_a, DType::bf16);
  check_dtype(of_b, DType::bf16);
  check_dtype(out, DType::f32);

  const int64_t tokens = a.rows(), m = a.cols(), n = b.cols(), g = d.shape[0];
  check_at_least_1(of_a, "M", m);
  check_at_least_1(of_b, "N", n);
  check_shape(of_b, {tokens, n}, "[T, N] with the T of a");
  check_num_groups(out);
  check_shape(out, {g, m, n}, "[G, M, N]");
  check_groups_vector(of_offsets, g + 1, "[G + 1] with the G of d");
  check_tma(of_a);
  check_tma(of_b);
  check_stack(out);
  check_memory({&of_a, &of_b, &of_offsets}, out);
  check_not_negative(kOp, "num_sms", options.num_sms);
}

}  // namespace phalanx
