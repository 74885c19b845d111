#include "ops/check_moe.h"

#include "device/moe/route.h"
#include "ops/check_tensor.h"
#include "text/text.h"

namespace phalanx {
namespace {

using std::int64_t;

constexpr int kMaxAlignment = 1 << 16;
constexpr int kScaleColumns = 128;

int64_t num_scales(int64_t hidden) { return ceil_div<int64_t>(hidden, kScaleColumns); }

void check_contiguous(const Arg& arg) {
  check_base(arg, size_of(arg->dtype));
  if (arg.empty()) return;
  int64_t stride = 1;
  for (int i = arg->ndim - 1; i >= 0; stride *= arg->shape[i--]) {
    if (arg->shape[i] > 1 && arg->strides[i] != stride) [[unlikely]]
      fail(ErrorCode::invalid_argument, arg, "it is not contiguous");
  }
}

/// One integer tensor of a routing.
void check_indices(const Arg& arg, const Arg& reference, std::initializer_list<int64_t> shape, const char* meaning) {
  check_rank(arg, int(shape.size()));
  check_device(arg, reference);
  check_dtype(arg, DType::int32);
  check_shape(arg, shape, meaning);
  check_contiguous(arg);
}

/// Rows of tokens: 16-byte vectors.
void check_vectors(const Arg& arg) {
  const int64_t hidden = arg->shape[arg->ndim - 1];
  if (hidden * size_of(arg->dtype) % 16 != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "H is {}, expected a multiple of {} (16 bytes)", hidden,
         16 / size_of(arg->dtype));
  check_tma(arg);
}

/// What checks of expert rows come to know: T and K of the routing, R and H of the rows.
struct Sizes {
  int64_t tokens, topk, rows, hidden;
};

Sizes check_expert_rows(const Arg& rows, const Routing& routing) {
  const Arg slots{rows.op, "routing.slots", routing.slots}, sources{rows.op, "routing.sources", routing.sources};
  check_rank(rows, rows->ndim == 3 ? 3 : 2);
  check_rank(slots, 2);
  check_rank(sources, 1);
  const int64_t num_rows = sources->shape[0], hidden = rows->shape[rows->ndim - 1];
  check_indices(slots, rows, {slots->rows(), slots->cols()}, "[T, K]");
  check_indices(sources, rows, {num_rows}, "[R]");
  if (slots->cols() > kMaxTopK) [[unlikely]]
    fail(ErrorCode::invalid_argument, slots, "K is {}, expected at most {}", slots->cols(), kMaxTopK);
  if (rows->ndim == 3) {
    const int64_t max_rows = rows->shape[1];
    if (rows->shape[0] * max_rows != num_rows) [[unlikely]]
      fail(ErrorCode::invalid_argument, rows, "it has {} rows, expected {}, those of routing.sources",
           rows->shape[0] * max_rows, num_rows);
    const int64_t row = max_rows > 1 ? rows->strides[1] : hidden;
    if (!rows.empty() && rows->shape[0] > 1 && max_rows > 1 && rows->strides[0] != max_rows * row) [[unlikely]]
      fail(ErrorCode::invalid_argument, rows, "its expert stride is {} elements, expected {} (no gap between experts)",
           rows->strides[0], max_rows * row);
  } else {
    check_shape(rows, {num_rows, hidden}, "[R, H] with the R of routing.sources");
  }
  const Tensor flat = flat_rows(rows.tensor);
  check_vectors({rows.op, rows.name, flat});
  return {slots->rows(), slots->cols(), num_rows, hidden};
}

void check_tokens(const Arg& arg, const Arg& rows, const Sizes& sizes) {
  check_rank(arg, 2);
  check_device(arg, rows);
  check_shape(arg, {sizes.tokens, sizes.hidden}, "[T, H] with the T of routing.slots and the H of the rows");
  check_vectors(arg);
}

void check_weights(const Arg& arg, const Arg& rows, const Sizes& sizes, Access access) {
  check_rank(arg, 2);
  check_device(arg, rows);
  check_dtype(arg, DType::f32);
  check_shape(arg, {sizes.tokens, sizes.topk}, "[T, K] of routing.slots");
  if (access == Access::write) return check_contiguous(arg);
  check_rows(arg, Access::read);
  check_base(arg, alignof(float));
}

/// Any strides that give every scale a place of its own.
void check_row_scales(const Arg& arg, const Arg& rows) {
  check_rank(arg, rows->ndim);
  check_device(arg, rows);
  check_dtype(arg, DType::f32);
  const int64_t columns = num_scales(rows->shape[rows->ndim - 1]);
  if (rows->ndim == 2)
    check_shape(arg, {rows->shape[0], columns}, "[R, ceil(H / 128)]");
  else
    check_shape(arg, {rows->shape[0], rows->shape[1], columns}, "[E, max_rows, ceil(H / 128)]");
  check_scales(arg, Access::write);
}

}  // namespace

Tensor flat_rows(const Tensor& rows) {
  if (rows.ndim == 2) return rows;
  const std::int64_t stride = rows.shape[1] > 1 ? rows.strides[1] : rows.strides[0];
  return {
      rows.data, rows.dtype, rows.device, 2, {rows.shape[0] * rows.shape[1], rows.shape[2]}, {stride, rows.strides[2]}};
}

void check_route(const char* op, const Tensor& topk_idx, const Routing& routing, const RouteOptions& options) {
  const Arg topk{op, "topk_idx", topk_idx}, counts{op, "routing.counts", routing.counts};
  const Arg offsets{op, "routing.offsets", routing.offsets}, slots{op, "routing.slots", routing.slots};
  const Arg sources{op, "routing.sources", routing.sources}, needed{op, "routing.needed", routing.needed};
  check_rank(topk, 2);
  check_dtype(topk, {DType::int32, DType::int64});
  check_rows(topk, Access::read);
  check_base(topk, size_of(topk_idx.dtype));
  if (topk_idx.cols() > kMaxTopK) [[unlikely]]
    fail(ErrorCode::invalid_argument, topk, "K is {}, expected at most {}", topk_idx.cols(), kMaxTopK);
  if (topk_idx.rows() * topk_idx.cols() > kMaxEntries) [[unlikely]]
    fail(ErrorCode::invalid_argument, topk, "it has more than {} entries", kMaxEntries);

  check_rank(counts, 1);
  const int64_t experts = routing.counts.shape[0];
  if (experts < 1 || experts > kMaxExperts) [[unlikely]]
    fail(ErrorCode::invalid_argument, counts, "E is {}, expected 1 to {}", experts, kMaxExperts);
  check_rank(sources, 1);
  check_indices(counts, topk, {experts}, "[E]");
  check_indices(offsets, topk, {experts + 1}, "[E + 1] with the E of routing.counts");
  check_indices(slots, topk, {topk_idx.rows(), topk_idx.cols()}, "[T, K] of topk_idx");
  check_indices(sources, topk, {routing.sources.shape[0]}, "[R]");
  check_indices(needed, topk, {1}, "[1]");

  const auto fail_option = [&](const char* name, int value, const std::string& expected) {
    throw Error(ErrorCode::invalid_argument, format_text("{}: {} is {}, expected {}", op, name, value, expected));
  };
  if (options.alignment < 1 || options.alignment > kMaxAlignment) [[unlikely]]
    fail_option("alignment", options.alignment, format_text("1 to {}", kMaxAlignment));
  if (options.max_rows < 0) [[unlikely]]
    fail_option("max_rows", options.max_rows, "0 (a contiguous target) or more");
  if (options.max_rows > 0 && options.alignment != 1) [[unlikely]]
    fail_option("alignment", options.alignment, "1, as masked targets have no use for it");
  if (options.max_rows > 0 && experts * options.max_rows != routing.sources.shape[0]) [[unlikely]]
    fail(ErrorCode::invalid_argument, sources, "expected {} elements, E * max_rows", experts * options.max_rows);

  const Arg* outputs[] = {&counts, &offsets, &slots, &sources, &needed};
  for (const Arg** output = outputs; output != std::end(outputs); ++output) {
    check_disjoint(**output, topk);
    for (const Arg** other = outputs; other != output; ++other) check_disjoint(**output, **other);
  }
}

void check_permute(const char* op, const Tensor& x, const Tensor* x_scales, const Routing& routing, const Tensor& rows,
                   const Tensor* scales) {
  const Arg in{op, x_scales ? "x.data" : "x", x}, out{op, scales ? "rows.data" : "rows", rows};
  const Arg slots{op, "routing.slots", routing.slots}, sources{op, "routing.sources", routing.sources};
  const Sizes sizes = check_expert_rows(out, routing);
  if (x_scales)
    check_dtype(in, DType::e4m3);
  else
    check_dtype(in, {DType::bf16, DType::f32});
  check_dtype(out, x.dtype);
  check_tokens(in, out, sizes);
  for (const Arg* other : {&in, &slots, &sources}) check_disjoint(out, *other);
  if (!x_scales) return;

  const Arg in_scales{op, "x.scales", *x_scales}, out_scales{op, "rows.scales", *scales};
  check_rank(in_scales, 2);
  check_device(in_scales, out);
  check_dtype(in_scales, DType::f32);
  check_shape(in_scales, {sizes.tokens, num_scales(sizes.hidden)}, "[T, ceil(H / 128)]");
  check_scales(in_scales, Access::read);
  check_row_scales(out_scales, out);
  for (const Arg* other : {&in, &in_scales, &slots, &sources, &out}) check_disjoint(out_scales, *other);
  check_disjoint(out, in_scales);
}

void check_unpermute(const Tensor& rows, const Routing& routing, const Tensor& out, const UnpermuteOptions& options) {
  constexpr const char* kOp = "unpermute";
  const Arg in{kOp, "rows", rows}, result{kOp, "out", out}, slots{kOp, "routing.slots", routing.slots};
  check_dtype(in, {DType::bf16, DType::f32});
  check_dtype(result, {DType::bf16, DType::f32});
  const Sizes sizes = check_expert_rows(in, routing);
  check_tokens(result, in, sizes);
  check_disjoint(result, in);
  check_disjoint(result, slots);
  if (options.weights) {
    const Arg weights{kOp, "options.weights", *options.weights};
    check_weights(weights, in, sizes, Access::read);
    check_disjoint(result, weights);
  }
  if (options.residual) {
    const Arg residual{kOp, "options.residual", *options.residual};
    check_dtype(residual, out.dtype);
    check_tokens(residual, in, sizes);
    if (!same_memory(*options.residual, out)) check_disjoint(result, residual);
  }
}

void check_unpermute_backward(const Tensor& grad_out, const Routing& routing, const Tensor& grad_rows,
                              const UnpermuteBackwardOptions& options) {
  constexpr const char* kOp = "unpermute_backward";
  const Arg in{kOp, "grad_out", grad_out}, result{kOp, "grad_rows", grad_rows};
  const Arg slots{kOp, "routing.slots", routing.slots}, sources{kOp, "routing.sources", routing.sources};
  check_dtype(in, {DType::bf16, DType::f32});
  check_dtype(result, {DType::bf16, DType::f32});
  const Sizes sizes = check_expert_rows(result, routing);
  check_tokens(in, result, sizes);
  for (const Arg* other : {&in, &slots, &sources}) check_disjoint(result, *other);
  if (options.weights) {
    const Arg weights{kOp, "options.weights", *options.weights};
    check_weights(weights, result, sizes, Access::read);
    check_disjoint(result, weights);
  }
  if (options.rows) {
    const Arg rows{kOp, "options.rows", *options.rows};
    check_dtype(rows, grad_rows.dtype);
    check_device(rows, result);
    check_expert_rows(rows, routing);
    if (options.rows->shape[options.rows->ndim - 1] != sizes.hidden) [[unlikely]]
      fail(ErrorCode::invalid_argument, rows, "expected H to be {}, that of grad_rows", sizes.hidden);
    check_disjoint(result, rows);
  }
  if (!options.grad_weights) return;
  const Arg grad_weights{kOp, "options.grad_weights", *options.grad_weights};
  if (!options.rows) [[unlikely]]
    fail(ErrorCode::invalid_argument, grad_weights, "it is given without options.rows, which it is computed from");
  const Arg rows{kOp, "options.rows", *options.rows};
  check_weights(grad_weights, result, sizes, Access::write);
  for (const Arg* other : {&in, &rows, &slots, &sources, &result}) check_disjoint(grad_weights, *other);
  if (options.weights) check_disjoint(grad_weights, {kOp, "options.weights", *options.weights});
}

}  // namespace phalanx
