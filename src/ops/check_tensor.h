// What checks of arguments are made of. Every check throws Error naming the operation, the argument, what it is and
// what was expected, and is a comparison and a jump never taken when all is well.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "phalanx/status.h"
#include "phalanx/tensor.h"
#include "text/text.h"

namespace phalanx {

/// An argument as messages call it.
struct Arg {
  const char* op;
  const char* name;
  const Tensor& tensor;

  const Tensor* operator->() const { return &tensor; }
  bool empty() const {
    for (int i = 0; i < tensor.ndim; ++i)
      if (tensor.shape[i] == 0) return true;
    return false;
  }
};

// Out of line, so that a check is a comparison and a jump never taken.
template <class... Args>
[[noreturn, gnu::cold, gnu::noinline]] void fail(ErrorCode code, const Arg& arg,
                                                 fmt::format_string<const Args&...> problem, const Args&... args) {
  throw Error(code,
              format_text("{}: {} is {}: {}", arg.op, arg.name, to_string(arg.tensor), format_text(problem, args...)));
}

enum class Access { read, write };

// --- one tensor ------------------------------------------------------------------------------------------------------

/// `ndim` dimensions that fit in 32 bits, on a device whose index is none below 0.
void check_rank(const Arg& arg, int ndim);
inline void check_matrix(const Arg& arg) { check_rank(arg, 2); }

void check_dtype(const Arg& arg, DType expected);
void check_dtype(const Arg& arg, std::initializer_list<DType> expected);

void check_shape(const Arg& arg, std::initializer_list<std::int64_t> expected, const char* meaning);

/// Memory is there, at a multiple of `alignment` bytes.
void check_base(const Arg& arg, int alignment);

/// Rows are contiguous, and those of an output do not overlap. Strides of dimensions of size 0 and 1 mean nothing.
void check_rows(const Arg& arg, Access access);

/// What TMA asks of a matrix, or of each in a stack; the CPU asks the same, so that a program does not change with the
/// device.
void check_tma(const Arg& arg);

/// Any strides; those of an output must give every element a place of its own. A matrix, or to be read.
void check_scales(const Arg& arg, Access access);

void check_at_least_1(const Arg& arg, const char* what, std::int64_t value);
void check_not_negative(const char* op, const char* name, int value);

// --- of groups -------------------------------------------------------------------------------------------------------

/// The first dimension, of a stack.
void check_num_groups(const Arg& arg);

/// Matrices of a stack: each as TMA wants it, a whole number of rows apart, in no order but ascending.
void check_stack(const Arg& arg);

/// Offsets, row groups or counts: int32, contiguous.
void check_groups_vector(const Arg& arg, std::int64_t size, const char* meaning);

// --- two tensors -----------------------------------------------------------------------------------------------------

void check_device(const Arg& arg, const Arg& reference);

/// `output` shares no memory with `other`; column ranges of one wider matrix do not.
void check_disjoint(const Arg& output, const Arg& other);

bool same_memory(const Tensor& x, const Tensor& y);

/// C of a product: a matrix like `out`, which it is or does not touch, on the device of `reference`.
void check_addend(const Arg& c, const Arg& out, const Arg& reference);

}  // namespace phalanx
