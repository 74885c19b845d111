#include "ops/check_tensor.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <numeric>

#include "ops/check.h"
#include "phalanx/grouped.h"

namespace phalanx {
namespace {

using std::int64_t;

constexpr int kTmaAlignment = 16;               // of bases and row strides, in bytes
constexpr int64_t kTmaStrideLimit = 1ll << 40;  // bytes
// Kernels count in 32 bits, and a tile reaches past the end.
constexpr int64_t kMaxDim = (1ll << 31) - (1 << 16);

// Of a matrix, or of each in a stack.
int64_t rows_of(const Arg& arg) { return arg->shape[arg->ndim - 2]; }
int64_t cols_of(const Arg& arg) { return arg->shape[arg->ndim - 1]; }
int64_t row_stride_of(const Arg& arg) { return arg->strides[arg->ndim - 2]; }
int64_t col_stride_of(const Arg& arg) { return arg->strides[arg->ndim - 1]; }

}  // namespace

// --- one tensor ------------------------------------------------------------------------------------------------------

void check_rank(const Arg& arg, int ndim) {
  if (arg->ndim != ndim) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "it has {} dimensions, expected {}", arg->ndim, ndim);
  for (int i = 0; i < ndim; ++i) {
    if (arg->shape[i] < 0 || arg->shape[i] > kMaxDim) [[unlikely]]
      fail(ErrorCode::invalid_argument, arg, "dimension {} is out of range, expected 0 to {}", arg->shape[i], kMaxDim);
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

void check_shape(const Arg& arg, std::initializer_list<int64_t> expected, const char* meaning) {
  if (std::equal(expected.begin(), expected.end(), arg->shape.begin())) [[likely]]
    return;
  std::string text;
  for (const int64_t dim : expected) text += (text.empty() ? "" : ", ") + std::to_string(dim);
  fail(ErrorCode::invalid_argument, arg, "expected shape [{}], that is {}", text, meaning);
}

void check_base(const Arg& arg, int alignment) {
  if (arg.empty()) return;
  if (arg->data == nullptr) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its data pointer is null");
  if (reinterpret_cast<std::uintptr_t>(arg->data) % alignment != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its data pointer is {}, expected a multiple of {} bytes",
         fmt::ptr(arg->data), alignment);
}

void check_rows(const Arg& arg, Access access) {
  if (arg.empty()) return;
  if (cols_of(arg) > 1 && col_stride_of(arg) != 1) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its column stride is {} elements, expected 1 (contiguous rows)",
         col_stride_of(arg));
  if (access == Access::write && rows_of(arg) > 1 && row_stride_of(arg) < cols_of(arg)) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its row stride is {} elements, expected at least its {} columns",
         row_stride_of(arg), cols_of(arg));
}

void check_tma(const Arg& arg) {
  check_rows(arg, Access::write);
  check_base(arg, kTmaAlignment);
  if (arg.empty() || rows_of(arg) == 1) return;
  const int64_t stride = row_stride_of(arg), limit = kTmaStrideLimit / size_of(arg->dtype);
  if (stride >= limit) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its row stride is {} elements, expected less than {} (2^40 bytes)", stride,
         limit);
  if (const int64_t bytes = stride * size_of(arg->dtype); bytes % kTmaAlignment != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its row stride is {} bytes, expected a multiple of {}", bytes,
         kTmaAlignment);
}

void check_scales(const Arg& arg, Access access) {
  check_base(arg, alignof(float));
  if (access == Access::read || arg.empty()) return;
  // From the smallest stride on, each passes all that the ones before it reach.
  std::array<int, Tensor::kMaxDims> order;
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, {}, [&](int i) { return std::abs(arg->strides[i]); });
  int64_t reach = 0;
  for (const int i : order) {
    if (i >= arg->ndim || arg->shape[i] == 1) continue;
    const int64_t stride = std::abs(arg->strides[i]);
    if (stride <= reach) [[unlikely]]
      fail(ErrorCode::invalid_argument, arg, "its strides make elements overlap");
    reach += (arg->shape[i] - 1) * stride;
  }
}

// --- of groups -------------------------------------------------------------------------------------------------------

void check_at_least_1(const Arg& arg, const char* what, int64_t value) {
  if (value < 1) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "{} is {}, expected at least 1", what, value);
}

void check_num_groups(const Arg& arg) {
  if (arg->shape[0] < 1 || arg->shape[0] > kMaxGroups) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "G is {}, expected 1 to {}", arg->shape[0], kMaxGroups);
}

void check_stack(const Arg& arg) {
  check_tma(arg);
  if (arg.empty() || arg->shape[0] == 1) return;
  const int64_t rows = arg->shape[1], row = rows > 1 ? arg->strides[1] : arg->strides[0], pitch = arg->strides[0];
  if (pitch < rows * row || pitch < arg->shape[2] || pitch % row != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its group stride is {} elements, expected a multiple of the row stride {}",
         pitch, row);
  if (pitch * size_of(arg->dtype) % 16 != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its group stride is {} bytes, expected a multiple of 16",
         pitch * size_of(arg->dtype));
  if (pitch / row > kMaxDim / arg->shape[0]) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "it spans more than {} rows", kMaxDim);
}

void check_groups_vector(const Arg& arg, int64_t size, const char* meaning) {
  check_dtype(arg, DType::int32);
  check_shape(arg, {size}, meaning);
  check_base(arg, alignof(std::int32_t));
  if (size > 1 && arg->strides[0] != 1) [[unlikely]]
    fail(ErrorCode::invalid_argument, arg, "its stride is {} elements, expected 1", arg->strides[0]);
}

void check_not_negative(const char* op, const char* name, int value) {
  if (value < 0) [[unlikely]]
    throw Error(ErrorCode::invalid_argument, format_text("{}: options.{} is {}, expected 0 or more", op, name, value));
}

// --- two tensors -----------------------------------------------------------------------------------------------------

void check_device(const Arg& arg, const Arg& reference) {
  if (arg->device != reference->device) [[unlikely]]
    fail(ErrorCode::invalid_device, arg, "expected the device of {}, {}", reference.name, to_string(reference->device));
}

namespace {

/// The bytes that a tensor spans, gaps between its rows included.
struct Extent {
  std::uintptr_t begin = 0, end = 0;
};

Extent extent_of(const Arg& arg) {
  if (arg.empty()) return {};
  const int64_t size = size_of(arg->dtype);
  const std::uintptr_t data = reinterpret_cast<std::uintptr_t>(arg->data);
  Extent extent{data, data + size};
  for (int i = 0; i < arg->ndim; ++i) {
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
  if (x->ndim != 2 || y->ndim != 2) return false;
  const int64_t pitch = x->strides[0] * size_of(x->dtype);
  if (x->rows() == 1 || y->rows() == 1 || pitch <= 0 || pitch != y->strides[0] * size_of(y->dtype)) return false;
  if ((x->cols() > 1 && x->strides[1] != 1) || (y->cols() > 1 && y->strides[1] != 1)) return false;
  const int64_t between = reinterpret_cast<std::intptr_t>(y->data) - reinterpret_cast<std::intptr_t>(x->data);
  const int64_t offset = (between % pitch + pitch) % pitch;
  return offset >= x->cols() * size_of(x->dtype) && offset + y->cols() * size_of(y->dtype) <= pitch;
}

}  // namespace

void check_disjoint(const Arg& output, const Arg& other) {
  const Extent x = extent_of(output), y = extent_of(other);
  if (x.begin < y.end && y.begin < x.end && !side_by_side(output, other)) [[unlikely]]
    fail(ErrorCode::invalid_argument, output, "its memory [{:#x}, {:#x}) overlaps that of {}, [{:#x}, {:#x})", x.begin,
         x.end, other.name, y.begin, y.end);
}

bool same_memory(const Tensor& x, const Tensor& y) {
  return x.data == y.data && (x.rows() <= 1 || x.strides[0] == y.strides[0]);
}

void check_addend(const Arg& c, const Arg& out, const Arg& reference) {
  check_matrix(c);
  check_device(c, reference);
  check_dtype(c, out->dtype);
  check_shape(c, {out->rows(), out->cols()}, "[M, N]");
  check_tma(c);
  if (!same_memory(c.tensor, out.tensor)) check_disjoint(out, c);
}

}  // namespace phalanx
