// Every kernel of the library as source text: the generator, and the finite list that warm-up and CI walk.
#pragma once

#include <vector>

#include "device/gemm/config.h"
#include "device/moe/config.h"
#include "device/quantize/config.h"
#include "jit/jit.h"

namespace phalanx::jit {

KernelSource gemm_source(const GemmConfig& config);
KernelSource quantize_source(const QuantizeConfig& config);
KernelSource dequantize_source(const DequantizeConfig& config);
KernelSource swiglu_quantize_source(const SwigluConfig& config);
KernelSource swiglu_backward_source(const SwigluBackwardConfig& config);
KernelSource swiglu_quantize_both_source();
KernelSource swiglu_backward_both_source(bool pairs);
KernelSource route_source();
KernelSource permute_source();
KernelSource route_and_permute_source(bool quantize);
KernelSource unpermute_source(const UnpermuteConfig& config);
KernelSource unpermute_backward_source(const UnpermuteConfig& config);
KernelSource ep_dispatch_source(bool counted);
KernelSource ep_combine_source(bool few);

/// Everything that any planner can return, each once.
std::vector<KernelSource> all_kernels();

}  // namespace phalanx::jit
