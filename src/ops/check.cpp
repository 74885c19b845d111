#include "ops/check.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "device/gemm/config.h"

namespace phalanx {
namespace {

using std::int64_t;

constexpr int kTmaAlignment = 16;               // of bases and row strides, in bytes
constexpr int64_t kTmaStrideLimit = 1ll << 40;  // bytes
constexpr int64_t kMaxDim = std::numeric_limits<std::int32_t>::max();

/// An argument as messages call it.
struct Arg {
  const char* op;
  const char* name;
  const Tensor& tensor;

  const Tensor* operator->() const { return &tensor; }
  bool empty() const { return tensor.rows() == 0 || tensor.cols() == 0; }
};

// Out of line, so that a check is a comparison and a jump never taken.
template <class... Args>
[[noreturn, gnu::cold, gnu::noinline]] void fail(ErrorCode code, const Arg& arg,
                                                 fmt::format_string<const Args&...> problem, const Args&... args) {
  throw Error(code,
              fmt::format("{}: {} is {}: {}", arg.op, arg.name, to_string(arg.tensor), fmt::format(problem, args...)));
}

// --- one tensor ------------------------------------------------------------------------------------------------------------

enum class Access { read, write };

void check_matrix(const Arg& arg) {
  if (arg->ndim != 2) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "it has {} dimensions, expected 2", arg->ndim);
  for (const int64_t dim : {arg->rows(), arg->cols()}) {
    if (dim < 0 || dim > kMaxDim) [[unlikely]]
      fail(ErrorCode::invalid_argument, arg, "dimension {} is out of range, expected 0 to {}", dim, kMaxDim);
  }
  if (arg->device.index < 0) [[unlikely]]
    fail(ErrorCode::invalid_device, arg, "device index {} is negative", arg->device.index);
}

void check_dtype(const Arg& arg, DType expected) {
  if (arg->dtype != expected) [[unlikely]]
    fail(ErrorCode::invalid_dtype, arg, "expected dtype {}", name_of(expected));
}

void check_dtype(const Arg& arg, std::initializer_list<DType> expected) {
  if (std::find(expected.begin(), expected.end(), arg->dtype) != expected.end()) [[likely]]
    return;
  std::string names;
  for (const DType dtype : expected) names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
  fail(ErrorCode::invalid_dtype, arg, "expected dtype {}", names);
}

void check_shape(const Arg& arg, int64_t rows, int64_t cols, const char* meaning) {
  if (arg->rows() != rows || arg->cols() != cols) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "expected shape [{}, {}], that is {}", rows, cols, meaning);
}

/// Memory is there, at a multiple of `alignment` bytes.
void check_base(const Arg& arg, int alignment) {
  if (arg.empty()) return;
  if (arg->data == nullptr) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its data pointer is null");
  if (reinterpret_cast<std::uintptr_t>(arg->data) % alignment != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its data pointer is {}, expected a multiple of {} bytes",
         fmt::ptr(arg->data), alignment);
}

/// Rows are contiguous, and those of an output do not overlap. Strides of dimensions of size 0 and 1 mean nothing.
void check_rows(const Arg& arg, Access access) {
  if (arg.empty()) return;
  if (arg->cols() > 1 && arg->strides[1] != 1) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its column stride is {} elements, expected 1 (contiguous rows)",
         arg->strides[1]);
  if (access == Access::write && arg->rows() > 1 && arg->strides[0] < arg->cols()) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its row stride is {} elements, expected at least its {} columns",
         arg->strides[0], arg->cols());
}

/// What TMA asks of a matrix; the CPU asks the same, so that a program does not change with the device.
void check_tma(const Arg& arg) {
  check_rows(arg, Access::write);
  check_base(arg, kTmaAlignment);
  if (arg.empty() || arg->rows() == 1) return;
  const int64_t stride = arg->strides[0], limit = kTmaStrideLimit / size_of(arg->dtype);
  if (stride >= limit) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its row stride is {} elements, expected less than {} (2^40 bytes)", stride,
         limit);
  if (const int64_t bytes = stride * size_of(arg->dtype); bytes % kTmaAlignment != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its row stride is {} bytes, expected a multiple of {}", bytes,
         kTmaAlignment);
}

/// Any strides; those of an output must give every element a place of its own.
void check_scales(const Arg& arg, Access access) {
  check_base(arg, alignof(float));
  if (access == Access::read || arg.empty()) return;
  const auto magnitude = [](int64_t stride) { return stride < 0 ? -stride : stride; };
  int64_t inner = magnitude(arg->strides[1]), outer = magnitude(arg->strides[0]);
  int64_t inner_count = arg->cols(), outer_count = arg->rows();
  if (inner_count == 1 || (outer_count > 1 && outer < inner)) {
    std::swap(inner, outer);
    std::swap(inner_count, outer_count);
  }
  const bool distinct = (inner_count == 1 || inner > 0) && (outer_count == 1 || outer > (inner_count - 1) * inner);
  if (!distinct) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its strides make elements overlap");
}

// --- two tensors -----------------------------------------------------------------------------------------------------------

void check_device(const Arg& arg, const Arg& reference) {
  if (arg->device != reference->device) [[unlikely]]
    fail(ErrorCode::invalid_device, arg, "expected the device of {}, {}", reference.name, to_string(reference->device));
}

/// The bytes that a tensor spans, gaps between its rows included.
struct Extent {
  std::uintptr_t begin = 0, end = 0;
};

Extent extent_of(const Arg& arg) {
  if (arg.empty()) return {};
  const int64_t size = size_of(arg->dtype);
  const std::uintptr_t data = reinterpret_cast<std::uintptr_t>(arg->data);
  Extent extent{data, data + size};
  for (const int i : {0, 1}) {
    if (arg->shape[i] == 1) continue;
    int64_t reach;
    if (__builtin_mul_overflow((arg->shape[i] - 1) * size, arg->strides[i], &reach)) [[unlikely]]
      fail(ErrorCode::invalid_argument, arg, "stride {} leads out of the address space", arg->strides[i]);
    (reach < 0 ? extent.begin : extent.end) += reach;
  }
  return extent;
}

/// Column ranges of one wider matrix: side by side, they span each other's rows and touch none.
bool side_by_side(const Arg& x, const Arg& y) {
  const int64_t pitch = x->strides[0] * size_of(x->dtype);
  if (x->rows() == 1 || y->rows() == 1 || pitch <= 0 || pitch != y->strides[0] * size_of(y->dtype)) return false;
  if ((x->cols() > 1 && x->strides[1] != 1) || (y->cols() > 1 && y->strides[1] != 1)) return false;
  const int64_t between = reinterpret_cast<std::intptr_t>(y->data) - reinterpret_cast<std::intptr_t>(x->data);
  const int64_t offset = (between % pitch + pitch) % pitch;
  return offset >= x->cols() * size_of(x->dtype) && offset + y->cols() * size_of(y->dtype) <= pitch;
}

void check_disjoint(const Arg& output, const Arg& other) {
  const Extent x = extent_of(output), y = extent_of(other);
  if (x.begin < y.end && y.begin < x.end && !side_by_side(output, other)) [[unlikely]]
    fail(ErrorCode::invalid_argument, output, "its memory [{:#x}, {:#x}) overlaps that of {}, [{:#x}, {:#x})", x.begin,
         x.end, other.name, y.begin, y.end);
}

bool same_memory(const Tensor& x, const Tensor& y) {
  return x.data == y.data && (x.rows() <= 1 || x.strides[0] == y.strides[0]);
}

}  // namespace

void check_gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const GemmOptions& options) {
  constexpr const char* kOp = "gemm_fp8";
  const Arg a_data{kOp, "a.data", a.data}, a_scales{kOp, "a.scales", a.scales};
  const Arg b_data{kOp, "b.data", b.data}, b_scales{kOp, "b.scales", b.scales};
  const Arg out{kOp, "d", d};

  for (const Arg* arg : {&a_data, &b_data, &a_scales, &b_scales, &out}) {
    check_matrix(*arg);
    check_device(*arg, a_data);
  }
  check_dtype(a_data, DType::e4m3);
  check_dtype(b_data, DType::e4m3);
  check_dtype(a_scales, DType::f32);
  check_dtype(b_scales, DType::f32);
  check_dtype(out, {DType::bf16, DType::f32});

  const int64_t m = a.data.rows(), k = a.data.cols(), n = b.data.rows();
  if (k < 1) [[unlikely]]
    fail(ErrorCode::invalid_argument, a_data, "K is {}, expected at least 1", k);
  if (n < 1) [[unlikely]]
    fail(ErrorCode::invalid_argument, b_data, "N is {}, expected at least 1", n);
  const int64_t k_blocks = ceil_div<int64_t>(k, kBlockK);
  check_shape(b_data, n, k, "[N, K] with the K of a.data");
  check_shape(a_scales, m, k_blocks, "[M, ceil(K / 128)]");
  check_shape(b_scales, ceil_div<int64_t>(n, kScaleBlock), k_blocks, "[ceil(N / 128), ceil(K / 128)]");
  check_shape(out, m, n, "[M, N]");

  check_tma(a_data);
  check_tma(b_data);
  check_tma(out);
  check_scales(a_scales, Access::read);
  check_scales(b_scales, Access::read);
  for (const Arg* input : {&a_data, &b_data, &a_scales, &b_scales}) check_disjoint(out, *input);

  if (options.c) {
    const Arg c{kOp, "options.c", *options.c};
    check_matrix(c);
    check_device(c, a_data);
    check_dtype(c, d.dtype);
    check_shape(c, m, n, "[M, N]");
    check_tma(c);
    if (!same_memory(c.tensor, d)) check_disjoint(out, c);
  }
  if (options.num_sms < 0) [[unlikely]]
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{}: options.num_sms is {}, expected 0 (all) or more", kOp, options.num_sms));
}

void check_quantize(const Tensor& x, const ScaledTensor& q, ScaleShape shape) {
  const bool by_rows = shape == ScaleShape::row_1x128;
  const char* op = by_rows ? "quantize_rows" : "quantize_blocks";
  const Arg in{op, "x", x}, data{op, "q.data", q.data}, scales{op, "q.scales", q.scales};
  for (const Arg* arg : {&in, &data, &scales}) {
    check_matrix(*arg);
    check_device(*arg, in);
  }
  check_dtype(in, {DType::bf16, DType::f16, DType::f32});
  check_dtype(data, DType::e4m3);
  check_dtype(scales, DType::f32);
  check_shape(data, x.rows(), x.cols(), "the shape of x");
  check_shape(scales, by_rows ? x.rows() : ceil_div<int64_t>(x.rows(), kQuantizeBlock),
              ceil_div<int64_t>(x.cols(), kQuantizeBlock),
              by_rows ? "one scale per 1 x 128 block" : "one scale per 128 x 128 block");
  check_rows(in, Access::read);
  check_base(in, size_of(x.dtype));
  check_rows(data, Access::write);
  check_base(data, 1);
  check_scales(scales, Access::write);
  check_disjoint(data, in);
  check_disjoint(scales, in);
  check_disjoint(scales, data);
}

ScaleShape check_dequantize(const ScaledTensor& q, const Tensor& x) {
  constexpr const char* kOp = "dequantize";
  const Arg data{kOp, "q.data", q.data}, scales{kOp, "q.scales", q.scales}, out{kOp, "x", x};
  for (const Arg* arg : {&data, &scales, &out}) {
    check_matrix(*arg);
    check_device(*arg, data);
  }
  check_dtype(data, DType::e4m3);
  check_dtype(scales, DType::f32);
  check_dtype(out, {DType::bf16, DType::f16, DType::f32});
  check_shape(out, q.data.rows(), q.data.cols(), "the shape of q.data");

  const int64_t rows = q.data.rows(), row_blocks = ceil_div<int64_t>(rows, kQuantizeBlock);
  const int64_t col_blocks = ceil_div<int64_t>(q.data.cols(), kQuantizeBlock);
  if ((q.scales.rows() != rows && q.scales.rows() != row_blocks) || q.scales.cols() != col_blocks) [[unlikely]]
    fail(ErrorCode::invalid_argument, scales, "expected shape [{}, {}] (1 x 128 blocks) or [{}, {}] (128 x 128 blocks)",
         rows, col_blocks, row_blocks, col_blocks);
  check_rows(data, Access::read);
  check_base(data, 1);
  check_scales(scales, Access::read);
  check_rows(out, Access::write);
  check_base(out, size_of(x.dtype));
  check_disjoint(out, data);
  check_disjoint(out, scales);
  return q.scales.rows() == rows ? ScaleShape::row_1x128 : ScaleShape::block_128x128;
}

}  // namespace phalanx
