// The kernels of expert parallelism: all of their shapes are run-time parameters.
#include "jit/kernels.h"
#include "text/text.h"

namespace phalanx::jit {
namespace {

KernelSource ep_source(const char* function, const char* params, const char* warps) {
  return {.name = function,
          .text = format_text(R"(#include "device/ep/{0}.cuh"
extern "C" __global__ void __launch_bounds__(32 * phalanx::{3}, 1) {1}(const __grid_constant__ phalanx::{2} params) {{ phalanx::ep_{0}(params); }}
)",
                              function + 3, kEntryPoint, params, warps)};
}

}  // namespace

KernelSource ep_dispatch_source() { return ep_source("ep_dispatch", "EpDispatchParams", "kEpDispatchWarps"); }
KernelSource ep_combine_source() { return ep_source("ep_combine", "EpCombineParams", "kEpCombineWarps"); }

}  // namespace phalanx::jit
