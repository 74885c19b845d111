#include "bindings/convert.h"

namespace phalanx::python {
namespace {

void quantize(AnyView x_data, AnyView q_data, AnyView q_scales, bool blocks, AnyView pow2_scales,
              Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor x = to_tensor("x", x_data);
    const ScaledTensor q{to_tensor("q.data", q_data), to_tensor("q.scales", q_scales)};
    const QuantizeOptions options{.pow2_scales = to_bool("pow2_scales", pow2_scales),
                                  .stream = to_stream(x.device, stream)};
    (blocks ? quantize_blocks : quantize_rows)(x, q, options);
  });
}

void quantize_transposed(AnyView x_data, AnyView q_data, AnyView q_scales, AnyView pow2_scales,
                         Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor x = to_tensor("x", x_data);
    const ScaledTensor q{to_tensor("q.data", q_data), to_tensor("q.scales", q_scales)};
    phalanx::quantize_transposed(
        x, q, {.pow2_scales = to_bool("pow2_scales", pow2_scales), .stream = to_stream(x.device, stream)});
  });
}

void quantize_both(AnyView x_data, AnyView q_data, AnyView q_scales, AnyView q_t_data, AnyView q_t_scales,
                   AnyView pow2_scales, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor x = to_tensor("x", x_data);
    const ScaledTensor q{to_tensor("q.data", q_data), to_tensor("q.scales", q_scales)};
    const ScaledTensor q_t{to_tensor("q_t.data", q_t_data), to_tensor("q_t.scales", q_t_scales)};
    phalanx::quantize_both(x, q, q_t,
                           {.pow2_scales = to_bool("pow2_scales", pow2_scales), .stream = to_stream(x.device, stream)});
  });
}

void dequantize(AnyView q_data, AnyView q_scales, AnyView x, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const ScaledTensor q{to_tensor("q.data", q_data), to_tensor("q.scales", q_scales)};
    phalanx::dequantize(q, to_tensor("x", x), to_stream(q.data.device, stream));
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize, quantize)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_transposed, quantize_transposed)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_both, quantize_both)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequantize, dequantize)

}  // namespace phalanx::python
