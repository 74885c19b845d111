// Matrices for tests: rows apart by any stride, guard rows around, everything that is not an element poisoned.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/convert.h"
#include "phalanx/tensor.h"

namespace phalanx::test {

// A printed seed makes a failure of random shapes repeatable.
inline constexpr unsigned kSeed = 20240607;

constexpr DType dtype_of(const cpu::E4m3*) { return DType::e4m3; }
constexpr DType dtype_of(const cpu::Bf16*) { return DType::bf16; }
constexpr DType dtype_of(const cpu::F16*) { return DType::f16; }
constexpr DType dtype_of(const float*) { return DType::f32; }
constexpr DType dtype_of(const std::int32_t*) { return DType::int32; }

enum class Order { row_major, col_major };

/// Every byte starts as 0xff: NaN in every dtype. Elements are written by the test; the rest must stay as it is.
template <class T>
class Matrix {
 public:
  Matrix(std::int64_t rows, std::int64_t cols, std::int64_t pad = 0, Order order = Order::row_major)
      : rows_(rows), cols_(cols), order_(order) {
    const std::int64_t inner = order == Order::row_major ? cols : rows,
                       unit = 16 / static_cast<std::int64_t>(sizeof(T));
    pitch_ = (std::max<std::int64_t>(inner, 1) + unit - 1) / unit * unit + pad * unit;
    lines_ = order == Order::row_major ? rows : cols;
    memory_.resize((lines_ + 2 * kGuards) * pitch_);
    std::memset(static_cast<void*>(memory_.data()), 0xff, memory_.size() * sizeof(T));
  }

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  T& at(std::int64_t i, std::int64_t j) { return memory_[offset(i, j)]; }
  const T& at(std::int64_t i, std::int64_t j) const { return memory_[offset(i, j)]; }
  double value(std::int64_t i, std::int64_t j) const { return cpu::to_f32(at(i, j)); }

  Tensor tensor() {
    T* data = memory_.data() + kGuards * pitch_;
    return order_ == Order::row_major ? row_major(data, dtype_of(data), rows_, cols_, {}, pitch_)
                                      : col_major(data, dtype_of(data), rows_, cols_, {}, pitch_);
  }

  /// Everything, frame included: for copies to and from a GPU.
  std::vector<T>& memory() { return memory_; }

  template <class F>
  Matrix& fill(F&& make) {
    for (std::int64_t i = 0; i < rows_; ++i)
      for (std::int64_t j = 0; j < cols_; ++j) at(i, j) = make(i, j);
    return *this;
  }

  /// Poison is where it was: in guard rows and in the padding of rows.
  void expect_frame_intact() const {
    std::vector<bool> is_element(memory_.size());
    for (std::int64_t i = 0; i < rows_; ++i)
      for (std::int64_t j = 0; j < cols_; ++j) is_element[offset(i, j)] = true;
    T poison;
    std::memset(static_cast<void*>(&poison), 0xff, sizeof poison);
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      if (is_element[i]) continue;
      ASSERT_EQ(0, std::memcmp(&memory_[i], &poison, sizeof poison))
          << "written outside of the matrix, at element " << i;
    }
  }

  bool same_bytes(const Matrix& other) const {
    return memory_.size() == other.memory_.size() &&
           std::memcmp(memory_.data(), other.memory_.data(), memory_.size() * sizeof(T)) == 0;
  }

 private:
  static constexpr std::int64_t kGuards = 2;

  std::int64_t offset(std::int64_t i, std::int64_t j) const {
    return order_ == Order::row_major ? (i + kGuards) * pitch_ + j : (j + kGuards) * pitch_ + i;
  }

  std::int64_t rows_, cols_, pitch_, lines_;
  Order order_;
  std::vector<T> memory_;
};

/// The value of an E4M3 code, from the format's definition alone.
inline double e4m3_value(unsigned code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<double>::quiet_NaN();
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

/// E4M3 by search: the nearest of all values, of two the even code; beyond 448 that; NaN is 0x7f.
inline unsigned nearest_e4m3(double x) {
  static const std::vector<double> values = [] {
    std::vector<double> v;
    for (unsigned code = 0; code < 0x7f; ++code) v.push_back(e4m3_value(code));
    return v;
  }();
  if (std::isnan(x)) return 0x7f;
  const double magnitude = std::min(std::abs(x), 1e6);  // infinity has no nearest
  unsigned best = 0;
  for (unsigned code = 1; code < values.size(); ++code) {
    const double distance = std::abs(magnitude - values[code]), best_distance = std::abs(magnitude - values[best]);
    if (distance < best_distance || (distance == best_distance && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(x) ? 0x80 : 0);
}

}  // namespace phalanx::test
