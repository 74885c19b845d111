// What every rung of the ladder is asked: D = A · Bᵀ. Read by the host and by the kernels.
#pragma once
#include "device/ptx/tensor_map.h"

namespace ladder {

// Rows are contiguous. M, N and K are multiples of 128.
struct Problem {
  phalanx::TensorMap a, b;             // the same matrices for TMA, in boxes of 128 x 128 with the 128-byte swizzle
  const phalanx::u8 *a_data, *b_data;  // E4M3 [m, k], [n, k]
  const float* sfa;                    // scales of A [k / 128, m]: of each row and k-block
  const float* sfb;                    // scales of B [n / 128, k / 128]: of each 128 x 128 block
  float* d;                            // [m, n]
  int m, n, k;
};

}  // namespace ladder
