// The kernels that quantise, and those of SwiGLU.
#include "jit/kernels.h"
#include "text/text.h"

namespace phalanx::jit {
namespace {

const char* name_of(FloatType type) {
  switch (type) {
    case FloatType::bf16:
      return "bf16";
    case FloatType::f16:
      return "f16";
    case FloatType::f32:
      break;
  }
  return "f32";
}

const char* name_of(ScaleShape shape) { return shape == ScaleShape::row_1x128 ? "row_1x128" : "block_128x128"; }

const char* name_of(QuantizeForm form) {
  switch (form) {
    case QuantizeForm::rows:
      return "rows";
    case QuantizeForm::blocks:
      return "blocks";
    case QuantizeForm::transposed:
      return "transposed";
    case QuantizeForm::both:
      break;
  }
  return "both";
}

// `config` initialises a `config_type`; `function` takes it as its template argument, and `params`.
KernelSource kernel(std::string name, const char* function, const char* header, const char* config_type,
                    const std::string& config, const char* params, const char* more_bounds = "") {
  return {.name = std::move(name),
          .text = format_text(R"(#include "device/quantize/{}.cuh"
using namespace phalanx;
constexpr {} kConfig{{{}}};
extern "C" __global__ void __launch_bounds__(kConfig.num_threads(){}) {}(const __grid_constant__ {} params) {{ {}<kConfig>(params); }}
)",
                              header, config_type, config, more_bounds, kEntryPoint, params, function)};
}

}  // namespace

KernelSource quantize_source(const QuantizeConfig& config) {
  const auto& [type, form] = config;
  return kernel(format_text("quantize_{}_{}", name_of(form), name_of(type)), "quantize", "quantize", "QuantizeConfig",
                format_text(".type = FloatType::{}, .form = QuantizeForm::{}", name_of(type), name_of(form)),
                "QuantizeParams", ", kConfig.min_ctas()");
}

KernelSource dequantize_source(const DequantizeConfig& config) {
  const auto& [type, shape] = config;
  return kernel(
      format_text("dequantize_{}_{}", name_of(shape), name_of(type)), "dequantize", "dequantize", "DequantizeConfig",
      format_text(".type = FloatType::{}, .shape = ScaleShape::{}", name_of(type), name_of(shape)), "DequantizeParams");
}

KernelSource swiglu_quantize_source(const SwigluConfig& config) {
  const auto& [type] = config;
  return kernel(format_text("swiglu_quantize_{}", name_of(type)), "swiglu_quantize", "swiglu", "SwigluConfig",
                format_text(".type = FloatType::{}", name_of(type)), "SwigluParams");
}

KernelSource swiglu_backward_source(const SwigluBackwardConfig& config) {
  const auto& [type] = config;
  return kernel(format_text("swiglu_backward_{}", name_of(type)), "swiglu_backward", "swiglu_backward",
                "SwigluBackwardConfig", format_text(".type = FloatType::{}", name_of(type)), "SwigluBackwardParams");
}

KernelSource swiglu_quantize_both_source() {
  return kernel("swiglu_quantize_both_bf16", "swiglu_quantize_both", "swiglu_tiles", "SwigluTilesConfig",
                ".type = FloatType::bf16", "SwigluParams", ", kConfig.min_ctas()");
}

KernelSource swiglu_backward_both_source(bool pairs) {
  return kernel(pairs ? "swiglu_backward_both_pairs_bf16" : "swiglu_backward_both_bf16", "swiglu_backward_both",
                "swiglu_tiles", "SwigluTilesConfig", format_text(".type = FloatType::bf16, .pairs = {}", pairs),
                "SwigluBackwardBothParams", ", kConfig.min_ctas()");
}

}  // namespace phalanx::jit
