#include "bindings/convert.h"

namespace phalanx::python {
namespace {

void gemm_bf16(AnyView a, AnyView b, AnyView d, AnyView c, AnyView num_sms, AnyView batch_invariant,
               Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor of_a = to_tensor("a", a);
    const GemmOptions options{.c = to_optional("c", c),
                              .stream = to_stream(of_a.device, stream),
                              .num_sms = to_int("num_sms", num_sms),
                              .batch_invariant = to_bool("batch_invariant", batch_invariant)};
    phalanx::gemm_bf16(of_a, to_tensor("b", b), to_tensor("d", d), options);
  });
}

// `groups` are offsets, row groups or counts: `Call` is the C++ function that takes them.
template <auto Call>
void grouped(const char* groups_name, const AnyView& a, const AnyView& b, const AnyView& groups, const AnyView& d,
             const AnyView& num_sms, const AnyView& expected_rows, const AnyView& batch_invariant,
             const Optional<std::int64_t>& stream) {
  translating_errors([&] {
    const Tensor of_a = to_tensor("a", a);
    const GroupedGemmOptions options{.stream = to_stream(of_a.device, stream),
                                     .num_sms = to_int("num_sms", num_sms),
                                     .expected_rows = to_int("expected_rows", expected_rows),
                                     .batch_invariant = to_bool("batch_invariant", batch_invariant)};
    Call(of_a, to_tensor("b", b), to_tensor(groups_name, groups), to_tensor("d", d), options);
  });
}

void grouped_gemm_bf16(AnyView a, AnyView b, AnyView offsets, AnyView d, AnyView num_sms, AnyView expected_rows,
                       AnyView batch_invariant, Optional<std::int64_t> stream) {
  grouped<phalanx::grouped_gemm_bf16>("offsets", a, b, offsets, d, num_sms, expected_rows, batch_invariant, stream);
}

void grouped_gemm_bf16_indexed(AnyView a, AnyView b, AnyView row_groups, AnyView d, AnyView num_sms,
                               AnyView expected_rows, AnyView batch_invariant, Optional<std::int64_t> stream) {
  grouped<phalanx::grouped_gemm_bf16_indexed>("row_groups", a, b, row_groups, d, num_sms, expected_rows,
                                              batch_invariant, stream);
}

void grouped_gemm_bf16_masked(AnyView a, AnyView b, AnyView counts, AnyView d, AnyView num_sms, AnyView expected_rows,
                              AnyView batch_invariant, Optional<std::int64_t> stream) {
  grouped<phalanx::grouped_gemm_bf16_masked>("counts", a, b, counts, d, num_sms, expected_rows, batch_invariant,
                                             stream);
}

void grouped_wgrad_bf16(AnyView a, AnyView b, AnyView offsets, AnyView d, AnyView accumulate, AnyView num_sms,
                        Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor of_a = to_tensor("a", a);
    const WgradOptions options{.accumulate = to_bool("accumulate", accumulate),
                               .stream = to_stream(of_a.device, stream),
                               .num_sms = to_int("num_sms", num_sms)};
    phalanx::grouped_wgrad_bf16(of_a, to_tensor("b", b), to_tensor("offsets", offsets), to_tensor("d", d), options);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_bf16, gemm_bf16)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm_bf16, grouped_gemm_bf16)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm_bf16_indexed, grouped_gemm_bf16_indexed)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm_bf16_masked, grouped_gemm_bf16_masked)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_wgrad_bf16, grouped_wgrad_bf16)

}  // namespace phalanx::python
