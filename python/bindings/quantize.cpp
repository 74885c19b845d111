#include "bindings/convert.h"

namespace phalanx::python {
namespace {

void quantize(AnyView x_data, AnyView q_data, AnyView q_scales, bool blocks, bool pow2_scales,
              Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor x = to_tensor("x", x_data);
    const ScaledTensor q{to_tensor("q.data", q_data), to_tensor("q.scales", q_scales)};
    const QuantizeOptions options{.pow2_scales = pow2_scales, .stream = to_stream(x.device, stream)};
    (blocks ? quantize_blocks : quantize_rows)(x, q, options);
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(dequantize, dequantize)

}  // namespace phalanx::python
