// check -> run, on the CPU or on CUDA. One kernel for each operation (and dtype, where they compute): nothing to plan.
#include <algorithm>
#include <bit>

#include "cpu/moe.h"
#include "cuda/cuda.h"
#include "device/moe/config.h"
#include "device/moe/params.h"
#include "jit/kernels.h"
#include "ops/check.h"
#include "ops/check_moe.h"
#include "ops/check_quantize.h"
#include "ops/check_tensor.h"
#include "ops/kernel.h"
#include "ops/scaled_matrix.h"
#include "phalanx/moe.h"
#include "phalanx/quantize.h"

namespace phalanx {
namespace {

using std::int64_t;

constexpr int kEntriesPerRouteCta = 4096, kMaxRouteCtas = 8;  // that many CTAs fit in a cluster on every GPU
constexpr int route_smem_bytes(int num_threads, int num_experts) {
  return 4 * route_smem_words(num_threads / 32, num_experts);
}

template <class T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.data);
}
int row_vectors(const Tensor& matrix) { return int(matrix.cols() * size_of(matrix.dtype) / 16); }
int64_t row_stride_bytes(const Tensor& matrix) { return row_stride(matrix) * size_of(matrix.dtype); }

RouteTarget target_of(const Routing& routing, const RouteOptions& options) {
  return {.num_rows = int(routing.sources.shape[0]), .alignment = options.alignment, .max_rows = options.max_rows};
}

RouteParams route_params(const Tensor& topk_idx, const Routing& routing, const RouteOptions& options) {
  return {.topk_idx = topk_idx.data,
          .topk_idx_stride = topk_idx.rows() > 1 ? topk_idx.strides[0] : topk_idx.cols(),
          .topk_idx_is_64 = topk_idx.dtype == DType::int64,
          .num_tokens = int(topk_idx.rows()),
          .topk = int(topk_idx.cols()),
          .num_experts = int(routing.counts.shape[0]),
          .by_topk = Divisor(int(topk_idx.cols())),
          .target = target_of(routing, options),
          .counts = pointer<int>(routing.counts),
          .offsets = pointer<int>(routing.offsets),
          .slots = pointer<int>(routing.slots),
          .sources = pointer<int>(routing.sources),
          .needed = pointer<int>(routing.needed)};
}

void route_on_cuda(const Tensor& topk_idx, const Routing& routing, const RouteOptions& options) {
  static KernelOfDevice kernels;
  const int ordinal = topk_idx.device.index;
  cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  const RouteParams p = route_params(topk_idx, routing, options);
  const int ctas = std::min(kMaxRouteCtas,
                            int(std::bit_ceil(unsigned(ceil_div(std::max(p.num_entries(), 1), kEntriesPerRouteCta)))));
  kernels.get(ordinal, jit::route_source, route_smem_bytes(kRouteThreads, kMaxExperts))
      .launch({.num_ctas = ctas,
               .num_threads = kRouteThreads,
               .cluster_size = ctas,
               .smem_bytes = route_smem_bytes(kRouteThreads, p.num_experts)},
              &p, options.stream.handle);
}

/// Rows of which CTAs of so many threads, from `first_cta` on, see to padding, and to scales, where `seen_to` says so.
ExpertRows expert_rows(const Tensor& rows, const Routing& routing, bool zero_padding, bool seen_to, int num_threads,
                       int first_cta) {
  ExpertRows result{.data = pointer<u8>(rows),
                    .stride = row_stride_bytes(rows),
                    .sources = pointer<int>(routing.sources),
                    .num_rows = int(rows.rows()),
                    .row_vectors = row_vectors(rows),
                    .groups = Divisor(ceil_div(row_vectors(rows), kClearedVectors)),
                    .zero_padding = zero_padding,
                    .first_cta = first_cta,
                    .num_ctas = 0};
  if (seen_to) result.num_ctas = ceil_div(result.num_rows, num_threads) * result.groups.value;
  return result;
}

/// What is permuted and where to; the scales are null for unquantised rows.
struct Permutation {
  const Tensor &x, &rows;
  const Tensor *x_scales = nullptr, *scales = nullptr;
  bool zero_padding;

  PermuteParams params(const Routing& routing) const {
    const Tensor flat = flat_rows(rows);
    PermuteParams p{.x = pointer<u8>(x),
                    .x_stride = row_stride_bytes(x),
                    .rows = expert_rows(flat, routing, zero_padding, scales || zero_padding, num_threads(),
                                        std::max(token_ctas(routing) - kCtasAtOnce, 0)),
                    .slots = pointer<int>(routing.slots),
                    .num_tokens = int(x.rows()),
                    .topk = int(routing.slots.cols()),
                    .pieces = Divisor(pieces()),
                    .by_topk = Divisor(int(routing.slots.cols()))};
    if (!scales) return p;
    const bool stack = scales->ndim == 3;
    p.x_scales = pointer<float>(*x_scales), p.scales = pointer<float>(*scales);
    p.x_scale_stride_row = x_scales->strides[0], p.x_scale_stride_col = x_scales->strides[1];
    p.scale_stride_expert = stack ? scales->strides[0] : 0;
    p.scale_stride_row = scales->strides[stack], p.scale_stride_col = scales->strides[1 + stack];
    p.num_scales = int(x_scales->cols());
    p.rows_per_expert = Divisor(int(stack ? scales->shape[1] : flat.rows()));
    return p;
  }

  int num_threads() const { return permute_threads(x.rows(), row_vectors(x)); }
  int pieces() const { return ceil_div(row_vectors(x), num_threads()); }
  int token_ctas(const Routing& routing) const { return routing.slots.cols() == 0 ? 0 : int(x.rows()) * pieces(); }

  /// Whether there is anything to write.
  bool empty() const { return flat_rows(rows).rows() == 0 || x.cols() == 0; }
};

void permute_on_cuda(const Permutation& permutation, const Routing& routing, Stream stream) {
  static KernelOfDevice kernels;
  const int ordinal = permutation.x.device.index;
  cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  const PermuteParams p = permutation.params(routing);
  const int ctas = permutation.token_ctas(routing) + p.rows.num_ctas;
  if (ctas > 0)
    kernels.get(ordinal, jit::permute_source)
        .launch({.num_ctas = ctas, .num_threads = permutation.num_threads()}, &p, stream.handle);
}

/// `unquantized`: what permutation.x is quantised from on the way; null if it is there.
void route_and_permute_on_cuda(const Permutation& permutation, const Tensor& topk_idx, const Routing& routing,
                               const RouteOptions& options, const Tensor* unquantized = nullptr) {
  static KernelOfDevice kernels[2];
  const int ordinal = topk_idx.device.index;
  const cuda::DeviceInfo& device = cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  RouteAndPermuteParams p{route_params(topk_idx, routing, options), permutation.params(routing), {}};
  if (unquantized) {
    p.permute.x = pointer<u8>(*unquantized), p.permute.x_stride = row_stride_bytes(*unquantized);
    p.q = scaled_matrix({permutation.x, *permutation.x_scales});
  }
  const int rows_of_ctas = ceil_div(p.permute.rows.num_rows, kFusedThreads / 32);
  const int ctas = std::clamp(std::max(p.permute.num_tokens, rows_of_ctas), 1, device.num_sms);
  const bool quantize = unquantized != nullptr;
  kernels[quantize]
      .get(
          ordinal, [&] { return jit::route_and_permute_source(quantize); },
          route_smem_bytes(kFusedThreads, kMaxExperts))
      .launch({.num_ctas = ctas,
               .num_threads = kFusedThreads,
               .smem_bytes = route_smem_bytes(kFusedThreads, p.route.num_experts)},
              &p, options.stream.handle);
}

void run_route(const Tensor& topk_idx, const Routing& routing, const RouteOptions& options) {
  if (topk_idx.device.type == DeviceType::cuda)
    route_on_cuda(topk_idx, routing, options);
  else
    cpu::route(topk_idx, routing, target_of(routing, options));
}

void run_permute(const Permutation& permutation, const Routing& routing, Stream stream) {
  if (permutation.empty()) return;
  if (permutation.x.device.type == DeviceType::cuda) return permute_on_cuda(permutation, routing, stream);
  cpu::permute(permutation.x, flat_rows(permutation.rows), routing, permutation.zero_padding);
  if (permutation.scales)
    cpu::permute_scales(*permutation.x_scales, *permutation.scales, routing, permutation.zero_padding);
}

bool in_one_kernel(const Permutation& permutation, const Tensor& topk_idx) {
  return topk_idx.device.type == DeviceType::cuda && topk_idx.rows() * topk_idx.cols() <= kMaxFusedEntries &&
         !permutation.empty();
}

// One kernel reads and writes all of these. `unquantized`: what permutation.x is quantised from, so that it is written
// as well; null if it is there.
void check_apart(const char* op, const Permutation& permutation, const Tensor& topk_idx, const Routing& routing,
                 const Tensor* unquantized = nullptr) {
  const bool scaled = permutation.scales != nullptr;
  const Arg topk{op, "topk_idx", topk_idx}, rows{op, scaled ? "rows.data" : "rows", permutation.rows};
  const Arg x{op, unquantized ? "q.data" : scaled ? "x.data" : "x", permutation.x};
  const Arg routed[] = {{op, "routing.counts", routing.counts},
                        {op, "routing.offsets", routing.offsets},
                        {op, "routing.slots", routing.slots},
                        {op, "routing.sources", routing.sources},
                        {op, "routing.needed", routing.needed}};
  check_disjoint(rows, topk);
  for (const Arg& part : routed) check_disjoint(part, x), check_disjoint(rows, part);
  if (!scaled) return;
  const Arg x_scales{op, unquantized ? "q.scales" : "x.scales", *permutation.x_scales};
  const Arg row_scales{op, "rows.scales", *permutation.scales};
  check_disjoint(row_scales, topk);
  for (const Arg& part : routed) check_disjoint(part, x_scales), check_disjoint(row_scales, part);
  if (!unquantized) return;
  const Arg source{op, "x", *unquantized};
  for (const Arg& part : routed) check_disjoint(part, source);
  for (const Arg* output : {&rows, &row_scales}) check_disjoint(*output, source);
  for (const Arg* output : {&x, &x_scales}) check_disjoint(*output, topk);
}

void run_route_and_permute(const Permutation& permutation, const Tensor& topk_idx, const Routing& routing,
                           const RouteOptions& options) {
  constexpr const char* kOp = "route_and_permute";
  check_route(kOp, topk_idx, routing, options);
  check_permute(kOp, permutation.x, permutation.x_scales, routing, permutation.rows, permutation.scales);
  check_apart(kOp, permutation, topk_idx, routing);
  if (in_one_kernel(permutation, topk_idx)) return route_and_permute_on_cuda(permutation, topk_idx, routing, options);
  run_route(topk_idx, routing, options);
  run_permute(permutation, routing, options.stream);
}

/// Kernels by the dtypes of rows and tokens.
struct UnpermuteKernels {
  KernelOfDevice kernels[2][2];

  template <class Source>
  const cuda::Kernel& get(int ordinal, const UnpermuteConfig& config, const Source& source) {
    return kernels[config.rows_f32][config.tokens_f32].get(ordinal, [&] { return source(config); });
  }
};

UnpermuteConfig unpermute_config(const Tensor& rows, const Tensor& tokens) {
  return {.rows_f32 = rows.dtype == DType::f32, .tokens_f32 = tokens.dtype == DType::f32};
}

const float* weights_of(const std::optional<Tensor>& weights) {
  return weights ? pointer<const float>(*weights) : nullptr;
}
int64_t stride_of(const std::optional<Tensor>& weights) {
  return weights && weights->rows() > 1 ? weights->strides[0] : 0;
}

void unpermute_on_cuda(const Tensor& rows, const Routing& routing, const Tensor& out, const UnpermuteOptions& options) {
  static UnpermuteKernels kernels;
  const int ordinal = out.device.index;
  cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  const UnpermuteParams p{.rows = pointer<u8>(rows),
                          .rows_stride = row_stride_bytes(rows),
                          .slots = pointer<int>(routing.slots),
                          .weights = weights_of(options.weights),
                          .weights_stride = stride_of(options.weights),
                          .residual = options.residual ? pointer<u8>(*options.residual) : nullptr,
                          .out = pointer<u8>(out),
                          .residual_stride = options.residual ? row_stride_bytes(*options.residual) : 0,
                          .out_stride = row_stride_bytes(out),
                          .num_tokens = int(out.rows()),
                          .topk = int(routing.slots.cols()),
                          .row_vectors = row_vectors(rows),
                          .pieces = Divisor(ceil_div(row_vectors(rows), kUnpermuteThreads))};
  const int ctas = p.num_tokens * p.pieces.value;
  kernels.get(ordinal, unpermute_config(rows, out), jit::unpermute_source)
      .launch({.num_ctas = ctas, .num_threads = kUnpermuteThreads}, &p, options.stream.handle);
}

void unpermute_backward_on_cuda(const Tensor& grad_out, const Routing& routing, const Tensor& grad_rows,
                                const UnpermuteBackwardOptions& options) {
  static UnpermuteKernels kernels;
  const int ordinal = grad_out.device.index;
  cuda::require_hopper(ordinal);
  const cuda::ContextGuard context(ordinal);
  const UnpermuteBackwardParams p{
      .grad_out = pointer<u8>(grad_out),
      .grad_out_stride = row_stride_bytes(grad_out),
      .rows = options.rows ? pointer<u8>(*options.rows) : nullptr,
      .rows_stride = options.rows ? row_stride_bytes(*options.rows) : 0,
      .slots = pointer<int>(routing.slots),
      .weights = weights_of(options.weights),
      .weights_stride = stride_of(options.weights),
      .grad_rows = expert_rows(grad_rows, routing, options.zero_padding, options.zero_padding, kBackwardThreads,
                               int(grad_out.rows())),
      .grad_weights = options.grad_weights ? pointer<float>(*options.grad_weights) : nullptr,
      .num_tokens = int(grad_out.rows()),
      .topk = int(routing.slots.cols())};
  if (const int ctas = p.num_tokens + p.grad_rows.num_ctas; ctas > 0)
    kernels.get(ordinal, unpermute_config(grad_rows, grad_out), jit::unpermute_backward_source)
        .launch({.num_ctas = ctas, .num_threads = kBackwardThreads}, &p, options.stream.handle);
}

}  // namespace

void route(const Tensor& topk_idx, const Routing& routing, const RouteOptions& options) {
  check_route("route", topk_idx, routing, options);
  run_route(topk_idx, routing, options);
}

void permute(const Tensor& x, const Routing& routing, const Tensor& rows, bool zero_padding, Stream stream) {
  check_permute("permute", x, nullptr, routing, rows, nullptr);
  run_permute({.x = x, .rows = rows, .zero_padding = zero_padding}, routing, stream);
}

void permute(const ScaledTensor& x, const Routing& routing, const ScaledTensor& rows, bool zero_padding,
             Stream stream) {
  check_permute("permute", x.data, &x.scales, routing, rows.data, &rows.scales);
  run_permute({x.data, rows.data, &x.scales, &rows.scales, zero_padding}, routing, stream);
}

void route_and_permute(const Tensor& x, const Tensor& topk_idx, const Routing& routing, const Tensor& rows,
                       bool zero_padding, const RouteOptions& options) {
  run_route_and_permute({.x = x, .rows = rows, .zero_padding = zero_padding}, topk_idx, routing, options);
}

void route_and_permute(const ScaledTensor& x, const Tensor& topk_idx, const Routing& routing, const ScaledTensor& rows,
                       bool zero_padding, const RouteOptions& options) {
  run_route_and_permute({x.data, rows.data, &x.scales, &rows.scales, zero_padding}, topk_idx, routing, options);
}

void quantize_route_and_permute(const Tensor& x, const ScaledTensor& q, const Tensor& topk_idx, const Routing& routing,
                                const ScaledTensor& rows, bool zero_padding, const RouteOptions& options) {
  constexpr const char* kOp = "quantize_route_and_permute";
  const Permutation permutation{q.data, rows.data, &q.scales, &rows.scales, zero_padding};
  check_quantize(QuantizeForm::rows, x, &q, nullptr);
  check_route(kOp, topk_idx, routing, options);
  check_permute(kOp, q.data, &q.scales, routing, rows.data, &rows.scales);
  check_apart(kOp, permutation, topk_idx, routing, &x);
  if (x.dtype == DType::bf16 && has_vectors(x, &q.data, x.cols()) && in_one_kernel(permutation, topk_idx))
    return route_and_permute_on_cuda(permutation, topk_idx, routing, options, &x);
  quantize_rows(x, q, {.stream = options.stream});
  run_route(topk_idx, routing, options);
  run_permute(permutation, routing, options.stream);
}

void unpermute(const Tensor& rows, const Routing& routing, const Tensor& out, const UnpermuteOptions& options) {
  check_unpermute(rows, routing, out, options);
  if (out.rows() == 0 || out.cols() == 0) return;
  if (out.device.type == DeviceType::cuda)
    unpermute_on_cuda(flat_rows(rows), routing, out, options);
  else
    cpu::unpermute(flat_rows(rows), routing, out, options);
}

void unpermute_backward(const Tensor& grad_out, const Routing& routing, const Tensor& grad_rows,
                        const UnpermuteBackwardOptions& options) {
  check_unpermute_backward(grad_out, routing, grad_rows, options);
  UnpermuteBackwardOptions flat = options;
  if (options.rows) flat.rows = flat_rows(*options.rows);
  if (grad_out.device.type == DeviceType::cuda)
    unpermute_backward_on_cuda(grad_out, routing, flat_rows(grad_rows), flat);
  else
    cpu::unpermute_backward(grad_out, routing, flat_rows(grad_rows), flat);
}

}  // namespace phalanx
