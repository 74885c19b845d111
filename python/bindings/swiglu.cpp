#include "bindings/convert.h"

namespace phalanx::python {
namespace {

SwigluOptions to_options(const Tensor& x, const AnyView& weights, double limit, const AnyView& interleaved,
                         const AnyView& pow2_scales, const Optional<std::int64_t>& stream) {
  return {.interleaved = to_bool("interleaved", interleaved),
          .limit = float(limit),
          .weights = to_optional("weights", weights),
          .pow2_scales = to_bool("pow2_scales", pow2_scales),
          .stream = to_stream(x.device, stream)};
}

void swiglu_quantize(AnyView x_data, AnyView weights, AnyView q_data, AnyView q_scales, double limit,
                     AnyView interleaved, AnyView pow2_scales, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor x = to_tensor("x", x_data);
    const ScaledTensor q{to_tensor("q.data", q_data), to_tensor("q.scales", q_scales)};
    phalanx::swiglu_quantize(x, q, to_options(x, weights, limit, interleaved, pow2_scales, stream));
  });
}

void swiglu_backward(AnyView x_data, AnyView grad_data, AnyView weights, AnyView grad_x, AnyView grad_weights,
                     double limit, AnyView interleaved, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor x = to_tensor("x", x_data), grad = to_tensor("grad", grad_data);
    phalanx::swiglu_backward(x, grad, to_tensor("grad_x", grad_x), to_optional("grad_weights", grad_weights),
                             to_options(x, weights, limit, interleaved, false, stream));
  });
}

void swiglu_quantize_both(AnyView x_data, AnyView weights, AnyView q_data, AnyView q_scales, AnyView q_t_data,
                          AnyView q_t_scales, double limit, AnyView interleaved, AnyView pow2_scales,
                          Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor x = to_tensor("x", x_data);
    const ScaledTensor q{to_tensor("q.data", q_data), to_tensor("q.scales", q_scales)};
    const ScaledTensor q_t{to_tensor("q_t.data", q_t_data), to_tensor("q_t.scales", q_t_scales)};
    phalanx::swiglu_quantize_both(x, q, q_t, to_options(x, weights, limit, interleaved, pow2_scales, stream));
  });
}

void swiglu_backward_both(AnyView x_data, AnyView grad, AnyView weights, AnyView q_data, AnyView q_scales,
                          AnyView q_t_data, AnyView q_t_scales, double limit, AnyView interleaved, AnyView pow2_scales,
                          Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor x = to_tensor("x", x_data);
    const ScaledTensor q{to_tensor("q.data", q_data), to_tensor("q.scales", q_scales)};
    const ScaledTensor q_t{to_tensor("q_t.data", q_t_data), to_tensor("q_t.scales", q_t_scales)};
    phalanx::swiglu_backward_both(x, to_tensor("grad", grad), q, q_t,
                                  to_options(x, weights, limit, interleaved, pow2_scales, stream));
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu_quantize, swiglu_quantize)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu_backward, swiglu_backward)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu_quantize_both, swiglu_quantize_both)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu_backward_both, swiglu_backward_both)

}  // namespace phalanx::python
