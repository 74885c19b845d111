// The operations of moe.h on host memory. Arguments have been checked by src/ops; rows are one matrix, of masked
// targets too.
#pragma once

#include "device/moe/route.h"
#include "phalanx/moe.h"

namespace phalanx::cpu {

void route(const Tensor& topk_idx, const Routing& routing, const RouteTarget& target);

void permute(const Tensor& x, const Tensor& rows, const Routing& routing, bool zero_padding);

/// Of the two matrices of scales; `scales` may be a stack.
void permute_scales(const Tensor& x_scales, const Tensor& scales, const Routing& routing, bool zero_padding);

void unpermute(const Tensor& rows, const Routing& routing, const Tensor& out, const UnpermuteOptions& options);

void unpermute_backward(const Tensor& grad_out, const Routing& routing, const Tensor& grad_rows,
                        const UnpermuteBackwardOptions& options);

}  // namespace phalanx::cpu
