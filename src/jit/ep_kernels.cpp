// The kernels of expert parallelism: all of their shapes are run-time parameters.
#include "jit/kernels.h"
#include "text/text.h"

namespace phalanx::jit {
namespace {

KernelSource ep_source(const char* name, const char* file, const char* function, const char* params,
                       const char* warps) {
  return {.name = name,
          .text = format_text(R"(#include "device/ep/{0}.cuh"
extern "C" __global__ void __launch_bounds__(32 * phalanx::{4}, 1) {1}(const __grid_constant__ phalanx::{3} params) {{ phalanx::{2}(params); }}
)",
                              file, kEntryPoint, function, params, warps)};
}

}  // namespace

KernelSource ep_dispatch_source(bool counted) {
  return ep_source(counted ? "ep_dispatch_counted" : "ep_dispatch", "dispatch",
                   counted ? "ep_dispatch<true>" : "ep_dispatch<false>", "EpDispatchParams", "kEpDispatchWarps");
}
KernelSource ep_combine_source(bool few) {
  return ep_source(few ? "ep_combine_few" : "ep_combine", "combine", few ? "ep_combine<true>" : "ep_combine<false>",
                   "EpCombineParams", "kEpCombineWarps");
}

}  // namespace phalanx::jit
