// How deep a pipeline may be.
#pragma once

#include "device/gemm/config.h"

namespace phalanx::plan {

constexpr int kSmemPerSm = 233472;  ///< bytes that the CTAs of one SM share

/// `c` with the deepest pipeline that fits in `smem_bytes`, up to 12 stages: more were never faster.
constexpr GemmConfig with_stages(GemmConfig c, int smem_bytes = kMaxSmemBytes) {
  for (c.num_stages = 12; c.num_stages > 2 && smem_layout(c).total > smem_bytes;) --c.num_stages;
  return c;
}

}  // namespace phalanx::plan
