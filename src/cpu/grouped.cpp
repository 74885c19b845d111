// Many products at once: the groups become views, and share the cores as the tiles of one product do. Groups that
// contradict themselves throw before anything is written.
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/convert.h"
#include "cpu/cpu.h"
#include "cpu/gemm_bf16.h"
#include "cpu/product.h"
#include "phalanx/status.h"

namespace phalanx::cpu {
namespace {

using std::int64_t;

struct Range {
  int64_t begin, end;
};

[[noreturn]] void fail(const char* op, const std::string& what, int64_t value, const std::string& expected) {
  throw Error(ErrorCode::invalid_argument,
              std::string(op) + ": " + what + " is " + std::to_string(value) + "; expected " + expected);
}

int64_t value_at(const Tensor& vector, int64_t i) { return static_cast<const std::int32_t*>(vector.data)[i]; }

std::string element(const char* name, int64_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

std::vector<Range> ranges_of_offsets(const char* op, const Tensor& offsets, int64_t limit) {
  std::vector<Range> ranges;
  int64_t begin = 0;
  for (int64_t i = 0; i < offsets.shape[0]; ++i) {
    const int64_t end = value_at(offsets, i);
    if (end < begin || end > limit)
      fail(op, element("offsets", i), end, "at least " + std::to_string(begin) + ", at most " + std::to_string(limit));
    if (i > 0) ranges.push_back({begin, end});
    begin = end;
  }
  return ranges;
}

std::vector<Range> ranges_of_row_groups(const char* op, const Tensor& row_groups, int64_t num_groups) {
  std::vector<Range> ranges(num_groups);
  int64_t previous = -1;
  for (int64_t i = 0; i < row_groups.shape[0]; ++i) {
    const int64_t group = value_at(row_groups, i);
    if (group < -1 || group >= num_groups)
      fail(op, element("row_groups", i), group, "-1 to " + std::to_string(num_groups - 1));
    if (group >= 0) {
      Range& range = ranges[group];
      if (group != previous) {
        if (range.end > 0) fail(op, element("row_groups", i), group, "the rows of each group to lie together");
        range.begin = i;
      }
      range.end = i + 1;
    }
    previous = group;
  }
  return ranges;
}

/// Rows [begin, end).
Tensor rows_of(const Tensor& matrix, const Range& range) {
  Tensor rows = matrix;
  rows.data = static_cast<char*>(matrix.data) + range.begin * matrix.strides[0] * size_of(matrix.dtype);
  rows.shape[0] = range.end - range.begin;
  return rows;
}

ScaledTensor rows_of(const ScaledTensor& x, const Range& range) {
  return {rows_of(x.data, range), rows_of(x.scales, range)};
}
ScaledTensor matrix_of(const ScaledTensor& x, int64_t i) {
  return {phalanx::matrix_of(x.data, i), phalanx::matrix_of(x.scales, i)};
}

void multiply_rows(const ScaledTensor& a, const ScaledTensor& b, const std::vector<Range>& ranges, const Tensor& d,
                   bool batch_invariant) {
  std::vector<Product> products;
  for (std::size_t g = 0; g < ranges.size(); ++g)
    products.push_back({.a = rows_of(a, ranges[g]),
                        .b = matrix_of(b, static_cast<int64_t>(g)),
                        .k_end = a.data.cols(),
                        .d = rows_of(d, ranges[g]),
                        .batch_invariant = batch_invariant});
  multiply(products);
}

void multiply_masked(const char* op, const ScaledTensor& a, const ScaledTensor& b, const Tensor& counts,
                     const Tensor& d, bool batch_invariant) {
  const int64_t limit = d.shape[1];
  std::vector<Product> products;
  for (int64_t g = 0; g < counts.shape[0]; ++g) {
    const int64_t count = value_at(counts, g);
    if (count < 0 || count > limit) fail(op, element("counts", g), count, "0 to " + std::to_string(limit));
    const Range rows{0, count};
    products.push_back({.a = rows_of(matrix_of(a, g), rows),
                        .b = matrix_of(b, g),
                        .k_end = a.data.shape[2],
                        .d = rows_of(phalanx::matrix_of(d, g), rows),
                        .batch_invariant = batch_invariant});
  }
  multiply(products);
}

void multiply_columns(const char* op, const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets,
                      const Tensor& d, bool accumulate) {
  const std::vector<Range> ranges = ranges_of_offsets(op, offsets, a.data.cols());
  std::vector<Product> products(ranges.size());
  for (std::size_t g = 0; g < ranges.size(); ++g) {
    Product& product = products[g] = {.a = a,
                                      .b = b,
                                      .b_by_rows = true,
                                      .k_begin = ranges[g].begin,
                                      .k_end = ranges[g].end,
                                      .d = phalanx::matrix_of(d, static_cast<int64_t>(g))};
    if (accumulate) product.c = &product.d;
  }
  multiply(products);
}

}  // namespace

void grouped_gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                      bool batch_invariant) {
  multiply_rows(a, b, ranges_of_offsets("grouped_gemm_fp8", offsets, d.rows()), d, batch_invariant);
}

void grouped_gemm_fp8_indexed(const ScaledTensor& a, const ScaledTensor& b, const Tensor& row_groups, const Tensor& d,
                              bool batch_invariant) {
  multiply_rows(a, b, ranges_of_row_groups("grouped_gemm_fp8_indexed", row_groups, b.data.shape[0]), d,
                batch_invariant);
}

void grouped_gemm_fp8_masked(const ScaledTensor& a, const ScaledTensor& b, const Tensor& counts, const Tensor& d,
                             bool batch_invariant) {
  multiply_masked("grouped_gemm_fp8_masked", a, b, counts, d, batch_invariant);
}

// Rows of no group stay as they are.
void grouped_gemm_fp8_swiglu(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const ScaledTensor& q,
                             const GroupedSwigluOptions& options) {
  const auto ranges = ranges_of_offsets("grouped_gemm_fp8_swiglu", offsets, a.data.rows());
  const Range all{ranges.front().begin, ranges.back().end};
  const int64_t n = b.data.shape[1];
  std::vector<Bf16> memory(options.gates_and_ups ? 0 : a.data.rows() * n);
  const Tensor x =
      options.gates_and_ups ? *options.gates_and_ups : row_major(memory.data(), DType::bf16, a.data.rows(), n);
  multiply_rows(a, b, ranges, x, options.batch_invariant);
  if (all.begin == all.end) return;
  SwigluOptions swiglu{.limit = options.limit, .pow2_scales = options.pow2_scales};
  if (options.weights) swiglu.weights = rows_of(*options.weights, all);
  cpu::swiglu_quantize(rows_of(x, all), rows_of(q, all), swiglu);
}

void wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, bool accumulate) {
  const Product product{
      .a = a, .b = b, .b_by_rows = true, .k_end = a.data.cols(), .d = d, .c = accumulate ? &d : nullptr};
  multiply({&product, 1});
}

void grouped_wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                       bool accumulate) {
  multiply_columns("grouped_wgrad_fp8", a, b, offsets, d, accumulate);
}

// --- BF16: no scales -------------------------------------------------------------------------------------------------

void grouped_gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d, bool batch_invariant) {
  multiply_rows({a, {}}, {b, {}}, ranges_of_offsets("grouped_gemm_bf16", offsets, d.rows()), d, batch_invariant);
}

void grouped_gemm_bf16_indexed(const Tensor& a, const Tensor& b, const Tensor& row_groups, const Tensor& d,
                               bool batch_invariant) {
  multiply_rows({a, {}}, {b, {}}, ranges_of_row_groups("grouped_gemm_bf16_indexed", row_groups, b.shape[0]), d,
                batch_invariant);
}

void grouped_gemm_bf16_masked(const Tensor& a, const Tensor& b, const Tensor& counts, const Tensor& d,
                              bool batch_invariant) {
  multiply_masked("grouped_gemm_bf16_masked", {a, {}}, {b, {}}, counts, d, batch_invariant);
}

void grouped_wgrad_bf16(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d, bool accumulate) {
  const auto columns = [](const Tensor& x) {
    return ScaledTensor{{x.data, x.dtype, x.device, 2, {x.cols(), x.rows()}, {x.strides[1], x.strides[0]}}, {}};
  };
  multiply_columns("grouped_wgrad_bf16", columns(a), columns(b), offsets, d, accumulate);
}

}  // namespace phalanx::cpu
