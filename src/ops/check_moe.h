// Argument checks of the operations of moe.h.
#pragma once

#include "phalanx/moe.h"

namespace phalanx {

/// A matrix, or a stack of matrices that follow each other without a gap, as one matrix.
Tensor flat_rows(const Tensor& rows);

void check_route(const char* op, const Tensor& topk_idx, const Routing& routing, const RouteOptions& options);

/// `x_scales` and `scales`: null for unquantised rows.
void check_permute(const char* op, const Tensor& x, const Tensor* x_scales, const Routing& routing, const Tensor& rows,
                   const Tensor* scales);

void check_unpermute(const Tensor& rows, const Routing& routing, const Tensor& out, const UnpermuteOptions& options);

void check_unpermute_backward(const Tensor& grad_out, const Routing& routing, const Tensor& grad_rows,
                              const UnpermuteBackwardOptions& options);

}  // namespace phalanx
