#include "bindings/convert.h"

namespace phalanx::python {
namespace {

ScaledTensor to_scaled(const char* data_name, const AnyView& data, const char* scales_name, const AnyView& scales) {
  return {to_tensor(data_name, data), to_tensor(scales_name, scales)};
}

// `groups` are offsets, row groups or counts: `Call` is the C++ function that takes them.
template <auto Call>
void grouped(const char* groups_name, const AnyView& a_data, const AnyView& a_scales, const AnyView& b_data,
             const AnyView& b_scales, const AnyView& groups, const AnyView& d, const AnyView& num_sms,
             const AnyView& expected_rows, const AnyView& batch_invariant, const Optional<std::int64_t>& stream) {
  translating_errors([&] {
    const ScaledTensor a = to_scaled("a.data", a_data, "a.scales", a_scales);
    const ScaledTensor b = to_scaled("b.data", b_data, "b.scales", b_scales);
    const GroupedGemmOptions options{.stream = to_stream(a.data.device, stream),
                                     .num_sms = to_int("num_sms", num_sms),
                                     .expected_rows = to_int("expected_rows", expected_rows),
                                     .batch_invariant = to_bool("batch_invariant", batch_invariant)};
    Call(a, b, to_tensor(groups_name, groups), to_tensor("d", d), options);
  });
}

void grouped_gemm_fp8(AnyView a, AnyView sfa, AnyView b, AnyView sfb, AnyView offsets, AnyView d, AnyView num_sms,
                      AnyView expected_rows, AnyView batch_invariant, Optional<std::int64_t> stream) {
  grouped<phalanx::grouped_gemm_fp8>("offsets", a, sfa, b, sfb, offsets, d, num_sms, expected_rows, batch_invariant,
                                     stream);
}

void grouped_gemm_fp8_indexed(AnyView a, AnyView sfa, AnyView b, AnyView sfb, AnyView row_groups, AnyView d,
                              AnyView num_sms, AnyView expected_rows, AnyView batch_invariant,
                              Optional<std::int64_t> stream) {
  grouped<phalanx::grouped_gemm_fp8_indexed>("row_groups", a, sfa, b, sfb, row_groups, d, num_sms, expected_rows,
                                             batch_invariant, stream);
}

void grouped_gemm_fp8_masked(AnyView a, AnyView sfa, AnyView b, AnyView sfb, AnyView counts, AnyView d, AnyView num_sms,
                             AnyView expected_rows, AnyView batch_invariant, Optional<std::int64_t> stream) {
  grouped<phalanx::grouped_gemm_fp8_masked>("counts", a, sfa, b, sfb, counts, d, num_sms, expected_rows,
                                            batch_invariant, stream);
}

void grouped_gemm_fp8_swiglu(AnyView a_data, AnyView a_scales, AnyView b_data, AnyView b_scales, AnyView offsets,
                             AnyView weights, AnyView gates_and_ups, AnyView q_data, AnyView q_scales, double limit,
                             AnyView pow2_scales, AnyView num_sms, AnyView expected_rows, AnyView batch_invariant,
                             Optional<std::int64_t> stream) {
  translating_errors([&] {
    const ScaledTensor a = to_scaled("a.data", a_data, "a.scales", a_scales);
    const ScaledTensor b = to_scaled("b.data", b_data, "b.scales", b_scales);
    const GroupedSwigluOptions options{.limit = float(limit),
                                       .weights = to_optional("weights", weights),
                                       .pow2_scales = to_bool("pow2_scales", pow2_scales),
                                       .gates_and_ups = to_optional("gates_and_ups", gates_and_ups),
                                       .stream = to_stream(a.data.device, stream),
                                       .num_sms = to_int("num_sms", num_sms),
                                       .expected_rows = to_int("expected_rows", expected_rows),
                                       .batch_invariant = to_bool("batch_invariant", batch_invariant)};
    phalanx::grouped_gemm_fp8_swiglu(a, b, to_tensor("offsets", offsets),
                                     to_scaled("q.data", q_data, "q.scales", q_scales), options);
  });
}

// Without offsets: one product.
void wgrad_fp8(AnyView a_data, AnyView a_scales, AnyView b_data, AnyView b_scales, AnyView offsets, AnyView d,
               AnyView accumulate, AnyView num_sms, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const ScaledTensor a = to_scaled("a.data", a_data, "a.scales", a_scales);
    const ScaledTensor b = to_scaled("b.data", b_data, "b.scales", b_scales);
    const WgradOptions options{.accumulate = to_bool("accumulate", accumulate),
                               .stream = to_stream(a.data.device, stream),
                               .num_sms = to_int("num_sms", num_sms)};
    if (offsets == nullptr)
      phalanx::wgrad_fp8(a, b, to_tensor("d", d), options);
    else
      phalanx::grouped_wgrad_fp8(a, b, to_tensor("offsets", offsets), to_tensor("d", d), options);
  });
}

void check_groups(bool cuda, std::int64_t index) {
  translating_errors([&] {
    phalanx::check_groups({cuda ? DeviceType::cuda : DeviceType::cpu, static_cast<int>(index)});
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm_fp8, grouped_gemm_fp8)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm_fp8_indexed, grouped_gemm_fp8_indexed)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm_fp8_masked, grouped_gemm_fp8_masked)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm_fp8_swiglu, grouped_gemm_fp8_swiglu)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(wgrad_fp8, wgrad_fp8)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(check_groups, check_groups)

}  // namespace phalanx::python
