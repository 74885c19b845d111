// The heart of every product on the CPU.
#pragma once

#include <cstdint>
#include <span>

#include "phalanx/tensor.h"

namespace phalanx::cpu {

/// D = A · Bᵀ (+ C) over the columns [k_begin, k_end) of A and B, scaled by the 128-deep k-blocks of the whole
/// matrices. BF16 operands have no scales, and any strides.
struct Product {
  ScaledTensor a, b;
  bool b_by_rows = false;  ///< B has a scale per 1 x 128, else per 128 x 128
  std::int64_t k_begin = 0, k_end = 0;
  Tensor d;
  const Tensor* c = nullptr;  ///< null, D itself or disjoint from it
  bool batch_invariant = false;
};

/// All of them, on all cores. The bits do not depend on the threads, nor on what else is multiplied.
void multiply(std::span<const Product> products);

}  // namespace phalanx::cpu
