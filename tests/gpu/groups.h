// Groups of rows for tests on the GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "device/gemm/groups.h"
#include "tests/gpu/on_gpu.h"

namespace phalanx::test {

/// Of several sizes, as each form of the grouped products says them.
struct Groups {
  std::vector<int> offsets, row_groups, counts;
  int max_rows = 0;

  explicit Groups(const std::vector<int>& sizes, int first) : offsets{first}, row_groups(first, -1), counts(sizes) {
    for (int g = 0; g < int(sizes.size()); ++g) {
      offsets.push_back(offsets.back() + sizes[g]);
      row_groups.insert(row_groups.end(), sizes[g], g);
      max_rows = std::max(max_rows, sizes[g]);
    }
  }
  const std::vector<int>& by(GroupsBy form) const {
    return form == GroupsBy::counts ? counts : form == GroupsBy::offsets ? offsets : row_groups;
  }
};

inline const Groups kGroups({3, 0, 130, 1, 64, 257, 0}, 3);
inline constexpr int kNumGroups = 7;

/// A vector of int32 on both sides.
struct Ints {
  Matrix<std::int32_t> host;
  DeviceCopy<std::int32_t> gpu;

  explicit Ints(const std::vector<int>& values)
      : host(Matrix<std::int32_t>(1, std::int64_t(values.size())).fill([&](auto, auto j) { return values[j]; })),
        gpu(host) {}
  static Tensor vector(Tensor t) { return {t.data, t.dtype, t.device, 1, {t.shape[1]}, {1}}; }
};

/// `groups` matrices, one under the other, as a stack.
inline Tensor stack(Tensor t, int groups) {
  const std::int64_t rows = t.shape[0] / groups;
  return {t.data, t.dtype, t.device, 3, {groups, rows, t.shape[1]}, {rows * t.strides[0], t.strides[0], t.strides[1]}};
}

}  // namespace phalanx::test
