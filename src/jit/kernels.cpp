#include "jit/kernels.h"

#include "plan/bf16.h"
#include "plan/grouped.h"
#include "plan/plan.h"
#include "text/text.h"

namespace phalanx::jit {
namespace {

constexpr const char* name_of(OutType type) {
  return type == OutType::bf16 ? "bf16" : type == OutType::f32 ? "f32" : "swiglu";
}

struct EntryPoint {
  const char *header, *function, *params = "GemmParams";
};

EntryPoint entry_point(const GemmConfig& c) {
  if (c.operand == Operand::bf16) return {"gemm/gemm_bf16", "gemm_bf16"};
  if (c.grouping == Grouping::columns) return {"gemm/gemm_fp8_wgrad", "wgrad_fp8"};
  if (c.gates_and_ups()) return {"moe/gemm_swiglu", "gemm_swiglu", "GemmSwigluParams"};
  return c.few_rows() ? EntryPoint{"gemm/gemm_fp8_few", "gemm_fp8_few"} : EntryPoint{"gemm/gemm_fp8", "gemm_fp8"};
}

}  // namespace

KernelSource gemm_source(const GemmConfig& config) {
  constexpr const char* kOperations[2][3] = {{"gemm_fp8", "grouped_gemm_fp8", "wgrad_fp8"},
                                             {"gemm_bf16", "grouped_gemm_bf16", "wgrad_bf16"}};
  constexpr const char *kGroupings[] = {"none", "rows", "columns"}, *kOperands[] = {"e4m3", "bf16"},
                       *kMajors[] = {"k", "mn"};
  // Names every field, so that one that is added and not printed here does not compile.
  const auto& [block_m, block_n, num_consumers, num_stages, cluster_n, cluster_m, split_k, out, grouping, operand,
               major_a, major_b] = config;
  const char* majors = kMajors[int(major_a)];
  const bool bf16 = operand == Operand::bf16;
  const EntryPoint entry = entry_point(config);
  return {.name = format_text("{}{}_{}x{}_c{}x{}_s{}_st{}_w{}_{}", kOperations[bf16][int(grouping)],
                              bf16 ? format_text("_{}_{}", majors, kMajors[int(major_b)]) : "", block_m, block_n,
                              cluster_m, cluster_n, split_k, num_stages, num_consumers, name_of(out)),
          .text = format_text(R"(#include "device/{}.cuh"
using namespace phalanx;
constexpr GemmConfig kConfig{{.block_m = {}, .block_n = {}, .num_consumers = {}, .num_stages = {}, .cluster_n = {}, .cluster_m = {}, .split_k = {}, .out = OutType::{}, .grouping = Grouping::{}, .operand = Operand::{}, .major_a = Major::{}, .major_b = Major::{}}};
extern "C" __global__ void __launch_bounds__(kConfig.num_threads(), ctas_per_sm(kConfig)) {}(const __grid_constant__ {} params) {{ {}<kConfig>(params); }}
)",
                              entry.header, block_m, block_n, num_consumers, num_stages, cluster_n, cluster_m, split_k,
                              name_of(out), kGroupings[int(grouping)], kOperands[int(operand)], majors,
                              kMajors[int(major_b)], kEntryPoint, entry.params, entry.function)};
}

std::vector<KernelSource> all_kernels() {
  std::vector<KernelSource> kernels;
  for (const GemmConfig& config : plan::all_gemm_configs()) kernels.push_back(gemm_source(config));
  for (const GemmConfig& config : plan::all_grouped_configs()) kernels.push_back(gemm_source(config));
  for (const GemmConfig& config : plan::all_bf16_configs()) kernels.push_back(gemm_source(config));
  for (const FloatType type : {FloatType::bf16, FloatType::f16, FloatType::f32}) {
    for (const QuantizeForm form :
         {QuantizeForm::rows, QuantizeForm::blocks, QuantizeForm::transposed, QuantizeForm::both})
      kernels.push_back(quantize_source({type, form}));
    for (const ScaleShape shape : {ScaleShape::row_1x128, ScaleShape::block_128x128})
      kernels.push_back(dequantize_source({type, shape}));
    kernels.push_back(swiglu_quantize_source({type}));
    kernels.push_back(swiglu_backward_source({type}));
  }
  kernels.insert(kernels.end(), {swiglu_quantize_both_source(), swiglu_backward_both_source(false),
                                 swiglu_backward_both_source(true)});
  kernels.insert(kernels.end(),
                 {route_source(), permute_source(), route_and_permute_source(false), route_and_permute_source(true)});
  for (const bool rows_f32 : {false, true}) {
    for (const bool tokens_f32 : {false, true}) {
      kernels.push_back(unpermute_source({rows_f32, tokens_f32}));
      kernels.push_back(unpermute_backward_source({rows_f32, tokens_f32}));
    }
  }
  for (const bool many : {false, true})
    kernels.insert(kernels.end(), {ep_dispatch_source(many), ep_combine_source(!many)});
  return kernels;
}

}  // namespace phalanx::jit
