// What fits on an SM and on the chip.
#pragma once

#include <algorithm>

#include "device/gemm/config.h"

namespace phalanx::plan {

/// `c` with the deepest pipeline that fits in `smem_bytes`, up to 12 stages: more were never faster.
constexpr GemmConfig with_stages(GemmConfig c, int smem_bytes = kMaxSmemBytes) {
  const int step = c.few_rows() ? c.num_consumers : 1;  // they take stages in turn
  for (c.num_stages = 12; c.num_stages > 2 && smem_layout(c).total > smem_bytes;) c.num_stages -= step;
  return c;
}

/// SMs that clusters of a size can occupy: those of a GPC that do not fill one stay idle.
inline int usable_sms(int cluster_size, int num_sms) {
  const int used = cluster_size <= 2 ? num_sms : cluster_size <= 4 ? num_sms * 10 / 11 : num_sms * 8 / 10;
  return std::max(used / cluster_size, 1) * cluster_size;
}

}  // namespace phalanx::plan
