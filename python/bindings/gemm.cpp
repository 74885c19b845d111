#include "bindings/convert.h"

namespace phalanx::python {
namespace {

void gemm_fp8(AnyView a_data, AnyView a_scales, AnyView b_data, AnyView b_scales, AnyView d, AnyView c, AnyView num_sms,
              AnyView batch_invariant, AnyView constant_b, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const ScaledTensor a{to_tensor("a.data", a_data), to_tensor("a.scales", a_scales)};
    const ScaledTensor b{to_tensor("b.data", b_data), to_tensor("b.scales", b_scales)};
    GemmOptions options;
    if (c != nullptr) options.c = to_tensor("c", c);
    options.stream = to_stream(a.data.device, stream);
    options.num_sms = to_int("num_sms", num_sms);
    options.batch_invariant = to_bool("batch_invariant", batch_invariant);
    options.constant_b = to_bool("constant_b", constant_b);
    phalanx::gemm_fp8(a, b, to_tensor("d", d), options);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_fp8, gemm_fp8)

}  // namespace phalanx::python
