// Tokens to their experts and back. This file is compiled without contraction of floating-point expressions, so that
// sums have the GPU's bits.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/convert.h"
#include "cpu/moe.h"
#include "cpu/parallel.h"

namespace phalanx::cpu {
namespace {

using std::int64_t;

int* ints(const Tensor& t) { return static_cast<int*>(t.data); }

template <class T>
T* row_of(const Tensor& matrix, int64_t i) {
  return static_cast<T*>(matrix.data) + i * matrix.strides[0];
}

/// Calls f(i) for 0 <= i < count on all cores, where one call moves `bytes`.
template <class F>
void for_each(int64_t count, int64_t bytes, const F& f) {
  constexpr int64_t kBand = 16;
  const int64_t num_bands = (count + kBand - 1) / kBand;
  TaskQueue bands(num_bands);
  run_on_threads(threads_for(num_bands, 0.2 * static_cast<double>(kBand * bytes)), [&](int) {
    for (int64_t band; bands.next(band);)
      for (int64_t i = band * kBand; i < std::min(count, (band + 1) * kBand); ++i) f(i);
  });
}

template <class Index>
void route_as(const Tensor& topk_idx, const Routing& routing, const RouteTarget& target) {
  const int64_t tokens = topk_idx.rows(), topk = topk_idx.cols();
  const int experts = static_cast<int>(routing.counts.shape[0]);
  int *counts = ints(routing.counts), *offsets = ints(routing.offsets), *slots = ints(routing.slots),
      *sources = ints(routing.sources);

  const auto expert_of = [&](int64_t t, int64_t k) {
    const int64_t expert = row_of<const Index>(topk_idx, t)[k];
    return expert >= 0 && expert < experts ? static_cast<int>(expert) : -1;
  };
  std::vector<int> chosen(experts), next(experts);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < topk; ++k)
      if (const int e = expert_of(t, k); e >= 0) ++chosen[e];

  int taken = 0, most = 0;
  for (int e = 0; e < experts; ++e) {
    next[e] = offsets[e] = first_row(target, e, taken);
    counts[e] = rows_that_fit(target, offsets[e], chosen[e]);
    taken += rows_taken(target, chosen[e]);
    most = std::max(most, chosen[e]);
  }
  offsets[experts] = first_row(target, experts, taken);
  *ints(routing.needed) = target.masked() ? most : taken;

  std::fill_n(sources, target.num_rows, -1);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < topk; ++k) {
      const int e = expert_of(t, k), entry = static_cast<int>(t * topk + k);
      const int row = e >= 0 && next[e] < offsets[e] + counts[e] ? next[e]++ : -1;
      slots[entry] = row;
      if (row >= 0) sources[row] = entry;
    }
  }
}

/// A token's choices that have a row.
struct Choices {
  const int* slots;
  const float* weights;  // or null
  int64_t count;

  Choices(const Routing& routing, const std::optional<Tensor>& all_weights, int64_t token)
      : slots(ints(routing.slots) + token * routing.slots.cols()),
        weights(all_weights ? row_of<const float>(*all_weights, token) : nullptr),
        count(routing.slots.cols()) {}

  float weight(int64_t k) const { return weights ? weights[k] : 1.0f; }
};

template <class Row, class Token>
void unpermute_as(const Tensor& rows, const Routing& routing, const Tensor& out, const UnpermuteOptions& options) {
  const int64_t hidden = out.cols();
  for_each(out.rows(), hidden * (routing.slots.cols() + 1) * 4, [&](int64_t t) {
    const Choices choices(routing, options.weights, t);
    std::vector<float> sum(hidden);
    for (int64_t k = 0; k < choices.count; ++k) {
      if (choices.slots[k] < 0) continue;
      const Row* row = row_of<const Row>(rows, choices.slots[k]);
      const float weight = choices.weight(k);
      for (int64_t i = 0; i < hidden; ++i) sum[i] += weight * to_f32(row[i]);
    }
    Token* result = row_of<Token>(out, t);
    if (options.residual) {
      const Token* residual = row_of<const Token>(*options.residual, t);
      for (int64_t i = 0; i < hidden; ++i) sum[i] += to_f32(residual[i]);
    }
    for (int64_t i = 0; i < hidden; ++i) result[i] = from_f32<Token>(sum[i]);
  });
}

/// Eight partial sums: their order is fixed, and the compiler can keep them in a vector.
template <class X, class Y>
float dot(const X* x, const Y* y, int64_t count) {
  constexpr int kLanes = 8;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += to_f32(x[i + lane]) * to_f32(y[i + lane]);
  for (; i < count; ++i) lanes[0] += to_f32(x[i]) * to_f32(y[i]);
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

void zero_padding_rows(const Tensor& rows, const Routing& routing) {
  const int64_t row_bytes = rows.cols() * size_of(rows.dtype);
  for_each(rows.rows(), row_bytes, [&](int64_t r) {
    if (ints(routing.sources)[r] < 0)
      std::memset(static_cast<char*>(rows.data) + r * rows.strides[0] * size_of(rows.dtype), 0, row_bytes);
  });
}

template <class Row, class Token>
void unpermute_backward_as(const Tensor& grad_out, const Routing& routing, const Tensor& grad_rows,
                           const UnpermuteBackwardOptions& options) {
  const int64_t hidden = grad_out.cols();
  for_each(grad_out.rows(), hidden * (routing.slots.cols() + 1) * 4, [&](int64_t t) {
    const Choices choices(routing, options.weights, t);
    const Token* grad = row_of<const Token>(grad_out, t);
    for (int64_t k = 0; k < choices.count; ++k) {
      const int slot = choices.slots[k];
      if (options.grad_weights)
        static_cast<float*>(options.grad_weights->data)[t * choices.count + k] =
            slot < 0 ? 0 : dot(grad, row_of<const Row>(*options.rows, slot), hidden);
      if (slot < 0) continue;
      Row* row = row_of<Row>(grad_rows, slot);
      const float weight = choices.weight(k);
      for (int64_t i = 0; i < hidden; ++i) row[i] = from_f32<Row>(weight * to_f32(grad[i]));
    }
  });
  if (options.zero_padding) zero_padding_rows(grad_rows, routing);
}

/// Calls f(Row{}, Token{}) with the storage types of the two.
template <class F>
void with_types(DType row, DType token, const F& f) {
  if (row == DType::bf16)
    token == DType::bf16 ? f(Bf16{}, Bf16{}) : f(Bf16{}, 0.0f);
  else
    token == DType::bf16 ? f(0.0f, Bf16{}) : f(0.0f, 0.0f);
}

}  // namespace

void route(const Tensor& topk_idx, const Routing& routing, const RouteTarget& target) {
  if (topk_idx.dtype == DType::int64)
    route_as<std::int64_t>(topk_idx, routing, target);
  else
    route_as<std::int32_t>(topk_idx, routing, target);
}

void permute(const Tensor& x, const Tensor& rows, const Routing& routing, bool zero_padding) {
  const int64_t size = size_of(x.dtype), row_bytes = x.cols() * size, topk = routing.slots.cols();
  for_each(rows.rows(), row_bytes, [&](int64_t r) {
    const int source = ints(routing.sources)[r];
    char* row = static_cast<char*>(rows.data) + r * rows.strides[0] * size;
    if (source >= 0)
      std::memcpy(row, static_cast<const char*>(x.data) + source / topk * x.strides[0] * size, row_bytes);
    else if (zero_padding)
      std::memset(row, 0, row_bytes);
  });
}

void permute_scales(const Tensor& x_scales, const Tensor& scales, const Routing& routing, bool zero_padding) {
  const bool stack = scales.ndim == 3;
  const int64_t experts = stack ? scales.shape[0] : 1, topk = routing.slots.cols();
  for (int64_t e = 0; e < experts; ++e) {
    const Tensor matrix = stack ? matrix_of(scales, e) : scales;
    for (int64_t i = 0; i < matrix.rows(); ++i) {
      const int source = ints(routing.sources)[e * matrix.rows() + i];
      if (source < 0 && !zero_padding) continue;
      for (int64_t j = 0; j < matrix.cols(); ++j)
        row_of<float>(matrix, i)[j * matrix.strides[1]] =
            source < 0 ? 1.0f : row_of<const float>(x_scales, source / topk)[j * x_scales.strides[1]];
    }
  }
}

void unpermute(const Tensor& rows, const Routing& routing, const Tensor& out, const UnpermuteOptions& options) {
  with_types(rows.dtype, out.dtype,
             [&]<class Row, class Token>(Row, Token) { unpermute_as<Row, Token>(rows, routing, out, options); });
}

void unpermute_backward(const Tensor& grad_out, const Routing& routing, const Tensor& grad_rows,
                        const UnpermuteBackwardOptions& options) {
  with_types(grad_rows.dtype, grad_out.dtype, [&]<class Row, class Token>(Row, Token) {
    unpermute_backward_as<Row, Token>(grad_out, routing, grad_rows, options);
  });
}

}  // namespace phalanx::cpu
