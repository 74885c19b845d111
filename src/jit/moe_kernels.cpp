// The kernels that move tokens to experts and back.
#include "device/moe/config.h"
#include "jit/kernels.h"
#include "text/text.h"

namespace phalanx::jit {
namespace {

// `params` and the number of threads as the header names them; `min_ctas` of an SM.
KernelSource moe_kernel(const char* function, const char* header, const char* params, const char* num_threads,
                        int min_ctas = 1) {
  return {.name = function,
          .text = format_text(R"(#include "device/moe/{}.cuh"
extern "C" __global__ void __launch_bounds__(phalanx::{}, {}) {}(const __grid_constant__ phalanx::{} params) {{ phalanx::{}(params); }}
)",
                              header, num_threads, min_ctas, kEntryPoint, params, function)};
}

KernelSource unpermute_kernel(const char* function, const char* params, const char* num_threads,
                              const UnpermuteConfig& config) {
  const auto& [rows_f32, tokens_f32] = config;
  const auto type = [](bool f32) { return f32 ? "f32" : "bf16"; };
  return {.name = format_text("{}_{}_{}", function, type(rows_f32), type(tokens_f32)),
          .text = format_text(R"(#include "device/moe/unpermute.cuh"
constexpr phalanx::UnpermuteConfig kConfig{{.rows_f32 = {}, .tokens_f32 = {}}};
extern "C" __global__ void __launch_bounds__(phalanx::{}, 1) {}(const __grid_constant__ phalanx::{} params) {{ phalanx::{}<kConfig>(params); }}
)",
                              rows_f32, tokens_f32, num_threads, kEntryPoint, params, function)};
}

}  // namespace

KernelSource route_source() { return moe_kernel("route", "route", "RouteParams", "kRouteThreads"); }
KernelSource permute_source() {
  return moe_kernel("permute", "permute", "PermuteParams", "kMaxPermuteThreads", kPermuteCtas);
}
KernelSource route_and_permute_source(bool quantize) {
  KernelSource source = moe_kernel(quantize ? "route_and_permute<true>" : "route_and_permute<false>",
                                   "route_and_permute", "RouteAndPermuteParams", "kFusedThreads");
  source.name = quantize ? "quantize_route_and_permute" : "route_and_permute";
  return source;
}
KernelSource unpermute_source(const UnpermuteConfig& config) {
  return unpermute_kernel("unpermute", "UnpermuteParams", "kUnpermuteThreads", config);
}
KernelSource unpermute_backward_source(const UnpermuteConfig& config) {
  return unpermute_kernel("unpermute_backward", "UnpermuteBackwardParams", "kBackwardThreads", config);
}

}  // namespace phalanx::jit
