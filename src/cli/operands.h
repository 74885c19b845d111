// The operands of a product that is measured, on whatever machine.
#pragma once

#include <memory>

#include "cli/machine.h"
#include "phalanx/phalanx.h"

namespace phalanx::cli {

struct Shape {
  int m, n, k;
};

/// "64x7168x2048" @throws Error invalid_argument, naming `option`
Shape parse_shape(const std::string& text, const char* option);

/// A matrix and the memory under it.
struct Matrix {
  std::shared_ptr<void> memory;
  Tensor view;
};

struct Operands {
  Matrix a, a_scales, b, b_scales, d;

  void multiply(const GemmOptions& options) const {
    gemm_fp8({a.view, a_scales.view}, {b.view, b_scales.view}, d.view, options);
  }
};

/// Normal random values, quantised: the power that a GPU draws, and with it the clock, depends on the data.
Operands make_operands(Machine& machine, const Shape& shape, DType out_dtype);

}  // namespace phalanx::cli
