// Every kernel of the library as source text: the generator, and the finite list that warm-up and CI walk.
#pragma once

#include <vector>

#include "device/gemm/config.h"
#include "device/quantize/config.h"
#include "jit/jit.h"

namespace phalanx::jit {

KernelSource gemm_source(const GemmConfig& config);
KernelSource quantize_source(const QuantizeConfig& config);
KernelSource dequantize_source(const QuantizeConfig& config);

/// Everything that any planner can return, each once.
std::vector<KernelSource> all_kernels();

}  // namespace phalanx::jit
