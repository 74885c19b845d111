// What products need between their checks and their kernels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/cuda.h"
#include "device/gemm/params.h"
#include "ops/check.h"
#include "ops/group_faults.h"
#include "ops/plan_cache.h"

namespace phalanx {

/// A matrix, or a stack of them seen as one, in which the same row of two neighbours is `pitch` rows apart.
struct Rows {
  Tensor matrix;
  int pitch = 0;

  explicit Rows(const Tensor& x) : matrix(x) {
    if (x.ndim == 2) return;
    const std::int64_t rows = x.shape[1], row = rows > 1 ? x.strides[1] : x.strides[0];
    matrix = matrix_of(x, 0);
    matrix.strides[0] = row;
    if (x.shape[0] == 1) return;
    pitch = int(x.strides[0] / row);
    matrix.shape[0] = (x.shape[0] - 1) * pitch + rows;
  }

  TensorMap map(int box_rows, int box_cols, bool read_once = false) const {
    return cuda::make_tensor_map({matrix.dtype, matrix.data, matrix.rows(), matrix.cols(),
                                  row_stride(matrix) * size_of(matrix.dtype), box_rows, box_cols, read_once});
  }
};

/// Whether B's map says `read_once`: it is 1 to 3 % of a chain. With taller tiles it is none, and K 512 takes 14 %
/// longer.
inline bool reads_b_once(const GemmConfig& config) { return config.block_m <= 64; }

/// The device, checked, and how many SMs may be used.
struct Place {
  int ordinal, num_sms;
  bool all_sms;

  Place(const Tensor& d, int limit) : ordinal(d.device.index) {
    const auto& device = cuda::require_hopper(ordinal);
    num_sms = usable_sms(device, limit);
    all_sms = num_sms == device.num_sms;
  }
};

/// The sizes of a product of rows in groups, each with its own B [N, K].
struct GroupedSizes {
  bool masked;
  int num_groups, n, k;
  int limit;  ///< rows of A, or where they are masked of each A[g]
  std::int64_t m;

  GroupedSizes(GroupsBy by, const Tensor& a, const Tensor& b)
      : masked(by == GroupsBy::counts),
        num_groups(int(b.shape[0])),
        n(int(b.shape[1])),
        k(int(b.shape[2])),
        limit(int(a.shape[masked ? 1 : 0])),
        m(masked ? std::int64_t(limit) * num_groups : limit) {}

  int planned_m() const { return int(std::min<std::int64_t>(m, 1 << 30)); }
};

/// Groups as a kernel is told of them, but for pitches and strides. Without `bounds` there is one, of all columns.
inline GroupParams groups_of(GroupsBy by, const Tensor* bounds, int num_groups, int limit, const Place& place) {
  return {.bounds = bounds ? static_cast<const int*>(bounds->data) : nullptr,
          .fault = fault_word(place.ordinal),
          .by = by,
          .num_groups = num_groups,
          .limit = limit};
}

/// Enqueues the kernel with `params`, of which `p`, a part or all, lacks only what the plan and the place say.
inline void launch(const PlannedGemm& planned, const void* params, GemmParams& p, const Place& place, Stream stream) {
  p.group_m = planned.plan.group_m;
  p.leaves_sms = !place.all_sms;
  const GemmConfig& config = planned.plan.config;
  planned.kernel->launch(
      {planned.plan.num_ctas, config.num_threads(), config.cluster_size(), smem_layout(config).total}, params,
      stream.handle);
}

inline void launch(const PlannedGemm& planned, GemmParams& p, const Place& place, Stream stream) {
  launch(planned, &p, p, place, stream);
}

}  // namespace phalanx
