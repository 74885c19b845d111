#include "ops/check_ep.h"

#include <numeric>

#include "device/ep/layout.h"
#include "ops/check_tensor.h"

namespace phalanx {
namespace {

using std::int64_t;

constexpr int kMaxSms = 1024;  // of a call; no GPU has more

template <class... Args>
[[noreturn, gnu::cold, gnu::noinline]] void fail_config(const char* field, int64_t value,
                                                        fmt::format_string<const Args&...> expected,
                                                        const Args&... args) {
  throw Error(ErrorCode::invalid_argument, format_text("ExpertParallel: config.{} is {}, expected {}", field, value,
                                                       format_text(expected, args...)));
}

void check_range(const char* field, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) fail_config(field, value, "{} to {}", low, high);
}

/// An int32 or FP32 vector, written or read densely.
void check_vector(const Arg& arg, DType dtype, int64_t length, const char* meaning, const Device& device) {
  check_rank(arg, 1);
  check_dtype(arg, dtype);
  check_shape(arg, {length}, meaning);
  check_base(arg, size_of(dtype));
  if (length > 1 && arg->strides[0] != 1) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its stride is {}, expected 1", arg->strides[0]);
  if (arg->device != device) [[unlikely]]
    fail(ErrorCode::invalid_device, arg, "expected the group's device");
}

/// A matrix that is moved in 16-byte pieces.
void check_data(const Arg& arg, const Device& device) {
  check_matrix(arg);
  check_tma(arg);
  if (arg->device != device) [[unlikely]]
    fail(ErrorCode::invalid_device, arg, "expected the group's device");
}

void check_tokens(const Arg& arg, const ExpertParallelConfig& config) {
  if (arg->rows() > config.max_tokens) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "it has {} tokens, expected at most config.max_tokens, {}", arg->rows(),
         config.max_tokens);
}

void check_hidden(const Arg& arg, const ExpertParallelConfig& config) {
  if (arg->cols() != config.hidden) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "it has {} columns, expected config.hidden, {}", arg->cols(), config.hidden);
}

void check_topk(const Arg& arg, int64_t tokens, const ExpertParallelConfig& config, const Device& device) {
  check_matrix(arg);
  check_shape(arg, {tokens, config.topk}, "[T, config.topk]");
  check_rows(arg, Access::read);
  check_base(arg, size_of(arg->dtype));
  if (arg->device != device) [[unlikely]]
    fail(ErrorCode::invalid_device, arg, "expected the group's device");
}

void check_scales_of(const Arg& scales, const Arg& data, const Device& device, Access access) {
  check_matrix(scales);
  check_dtype(scales, DType::f32);
  check_shape(scales, {data->rows(), ceil_div<int64_t>(data->cols(), 128)}, "one scale per 1 x 128 block");
  check_scales(scales, access);
  if (scales->device != device) [[unlikely]]
    fail(ErrorCode::invalid_device, scales, "expected the group's device");
}

constexpr const char* kDispatch = "dispatch";

void check_copy(const EpDispatch& args, const ExpertParallelConfig& config, const Device& device) {
  const Arg x{kDispatch, "x", args.x}, rows{kDispatch, "rows", args.rows};
  check_data(x, device);
  check_data(rows, device);
  check_tokens(x, config);
  check_hidden(x, config);
  check_hidden(rows, config);
  check_dtype(x, {DType::bf16, DType::e4m3});
  check_dtype(rows, {DType::bf16, DType::e4m3});
  if (x->dtype == DType::e4m3) check_dtype(rows, DType::e4m3);
  if (rows->dtype == DType::bf16 && config.dtype != DType::bf16) [[unlikely]]
    fail(ErrorCode::invalid_dtype, rows, "expected e4m3, as config.dtype says, or a config whose dtype is bf16");
  if (rows->dtype == DType::e4m3 && config.hidden % 16 != 0) [[unlikely]]
    fail(ErrorCode::invalid_dtype, rows, "expected bf16, as config.hidden, {}, is no multiple of 16", config.hidden);
  check_disjoint(rows, x);

  if (args.x_scales.has_value() != (x->dtype == DType::e4m3)) [[unlikely]]
    fail(ErrorCode::invalid_argument, x, "expected x_scales exactly with e4m3");
  if (args.row_scales.has_value() != (rows->dtype == DType::e4m3)) [[unlikely]]
    fail(ErrorCode::invalid_argument, rows, "expected row_scales exactly with e4m3");
  if (args.x_scales) check_scales_of({kDispatch, "x_scales", *args.x_scales}, x, device, Access::read);
  if (args.row_scales) {
    const Arg scales{kDispatch, "row_scales", *args.row_scales};
    check_scales_of(scales, rows, device, Access::write);
    if (rows->rows() > 1 && scales->strides[0] != 1) [[unlikely]]
      fail(ErrorCode::invalid_argument, scales, "its row stride is {}, expected 1 (MN-major)", scales->strides[0]);
  }
  if (args.row_weights)
    check_vector({kDispatch, "row_weights", *args.row_weights}, DType::f32, rows->rows(), "one a row", device);
}

}  // namespace

void check_ep_config(const ExpertParallelConfig& config, int num_ranks) {
  if (num_ranks < 1 || num_ranks > kEpMaxRanks)
    throw Error(ErrorCode::invalid_argument,
                format_text("ExpertParallel: num_ranks is {}, expected 1 to {}", num_ranks, kEpMaxRanks));
  check_range("hidden", config.hidden, 1, 1 << 20);
  if (config.dtype != DType::e4m3 && config.dtype != DType::bf16)
    throw Error(ErrorCode::invalid_dtype,
                format_text("ExpertParallel: config.dtype is {}, expected e4m3 or bf16", name_of(config.dtype)));
  if (const int unit = 16 / size_of(config.dtype); config.hidden % unit != 0)
    fail_config("hidden", config.hidden, "a multiple of {}, 16 bytes of {}", unit, name_of(config.dtype));
  check_range("num_experts", config.num_experts, 1, 1 << 20);
  check_range("topk", config.topk, 1, kEpMaxTopk);
  check_range("max_tokens", config.max_tokens, 0, 1 << 18);
  check_range("num_sms", config.num_sms, 0, kMaxSms);
  check_range("alignment", config.alignment, 1, 1 << 16);
  int largest = ceil_div(config.num_experts, num_ranks);
  if (!config.experts_per_rank.empty()) {
    if (ssize(config.experts_per_rank) != num_ranks)
      fail_config("experts_per_rank.size()", ssize(config.experts_per_rank), "{}, the number of ranks", num_ranks);
    for (const int experts : config.experts_per_rank) check_range("experts_per_rank[]", experts, 0, config.num_experts);
    const int64_t sum = std::accumulate(config.experts_per_rank.begin(), config.experts_per_rank.end(), int64_t{0});
    if (sum != config.num_experts) fail_config("experts_per_rank, summed,", sum, "num_experts, {}", config.num_experts);
    largest = *std::max_element(config.experts_per_rank.begin(), config.experts_per_rank.end());
  }
  EpShape shape;
  shape.num_ranks = num_ranks;
  if (4 * ep_route_smem(shape, largest).words + 4 * 2048 > kEpMaxRouteSmemBytes)
    fail_config("num_experts", config.num_experts, "fewer: {} on one of {} ranks are more than a kernel can count",
                largest, num_ranks);
  if (int64_t{num_ranks} * config.max_tokens * config.topk > 1 << 30)
    fail_config("max_tokens", config.max_tokens, "fewer: {} ranks times top-{} make rows that no int32 counts",
                num_ranks, config.topk);
}

void check_ep_handle(const char* op, const Tensor& handle, const Device& device, int64_t words) {
  check_vector({op, "handle", handle}, DType::int32, words, "[handle_words()]", device);
}

void check_ep_dispatch(const EpDispatch& args, const ExpertParallelConfig& config, const Device& device,
                       int64_t handle_words, int num_local_experts, bool copy) {
  check_ep_handle(kDispatch, args.handle, device, handle_words);
  if (copy) check_copy(args, config, device);
  if (args.topk_idx) {
    const Arg topk{kDispatch, "topk_idx", *args.topk_idx};
    check_dtype(topk, {DType::int32, DType::int64});
    check_topk(topk, copy ? args.x.rows() : topk->shape[0], config, device);
    check_tokens(topk, config);
    if (args.topk_weights) {
      const Arg weights{kDispatch, "topk_weights", *args.topk_weights};
      check_dtype(weights, DType::f32);
      check_topk(weights, topk->rows(), config, device);
    }
  } else if (!copy) {
    throw Error(ErrorCode::invalid_argument, "route: topk_idx is absent");
  } else if (args.topk_weights) {
    throw Error(ErrorCode::invalid_argument, "dispatch: topk_weights come without topk_idx, expected both or neither");
  }
  if (args.offsets)
    check_vector({kDispatch, "offsets", *args.offsets}, DType::int32, num_local_experts + 1, "[local experts + 1]",
                 device);
  if (args.counts)
    check_vector({kDispatch, "counts", *args.counts}, DType::int32, num_local_experts, "[local experts]", device);
}

void check_ep_combine(const EpCombine& args, const ExpertParallelConfig& config, const Device& device,
                      int64_t handle_words) {
  constexpr const char* kOp = "combine";
  const Arg rows{kOp, "rows", args.rows}, out{kOp, "out", args.out};
  check_ep_handle(kOp, args.handle, device, handle_words);
  for (const Arg* arg : {&rows, &out}) {
    check_data(*arg, device);
    check_dtype(*arg, DType::bf16);
    check_hidden(*arg, config);
  }
  check_tokens(out, config);
  check_disjoint(out, rows);
  if (args.residual) {
    const Arg residual{kOp, "residual", *args.residual};
    check_data(residual, device);
    check_dtype(residual, DType::bf16);
    check_shape(residual, {out->rows(), out->cols()}, "the shape of out");
    if (!same_memory(residual.tensor, out.tensor)) check_disjoint(out, residual);
  }
  if (args.row_values.has_value() != args.topk_values.has_value())
    throw Error(ErrorCode::invalid_argument, "combine: row_values and topk_values, expected both or neither");
  if (args.row_values) {
    check_vector({kOp, "row_values", *args.row_values}, DType::f32, rows->rows(), "one a row", device);
    const Arg values{kOp, "topk_values", *args.topk_values};
    check_dtype(values, DType::f32);
    check_topk(values, out->rows(), config, device);
    if (values->rows() > 1 && values->strides[0] != config.topk) [[unlikely]]
      fail(ErrorCode::invalid_argument, values, "its row stride is {}, expected its {} columns", values->strides[0],
           config.topk);
  }
}

}  // namespace phalanx
