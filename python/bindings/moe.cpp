#include "bindings/convert.h"

namespace phalanx::python {
namespace {

Routing to_routing(const AnyView& counts, const AnyView& offsets, const AnyView& slots, const AnyView& sources,
                   const AnyView& needed) {
  return {to_tensor("routing.counts", counts), to_tensor("routing.offsets", offsets), to_tensor("routing.slots", slots),
          to_tensor("routing.sources", sources), to_tensor("routing.needed", needed)};
}

/// What the operations on rows read of one.
Routing to_routing(const AnyView& slots, const AnyView& sources) {
  Routing routing;
  routing.slots = to_tensor("routing.slots", slots);
  routing.sources = to_tensor("routing.sources", sources);
  return routing;
}

RouteOptions route_options(std::int64_t alignment, std::int64_t max_rows, const Stream& stream) {
  return {.alignment = to_int("alignment", alignment), .max_rows = to_int("max_rows", max_rows), .stream = stream};
}

void route(AnyView topk_idx, AnyView counts, AnyView offsets, AnyView slots, AnyView sources, AnyView needed,
           std::int64_t alignment, std::int64_t max_rows, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor topk = to_tensor("topk_idx", topk_idx);
    phalanx::route(topk, to_routing(counts, offsets, slots, sources, needed),
                   route_options(alignment, max_rows, to_stream(topk.device, stream)));
  });
}

// `x_scales` and `scales` are none for unquantised rows.
void permute(AnyView x_data, AnyView x_scales, AnyView slots, AnyView sources, AnyView rows, AnyView scales,
             AnyView zero_padding, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Routing routing = to_routing(slots, sources);
    if (x_scales == nullptr) {
      const Tensor x = to_tensor("x", x_data);
      return phalanx::permute(x, routing, to_tensor("rows", rows), to_bool("zero_padding", zero_padding),
                              to_stream(x.device, stream));
    }
    const ScaledTensor x{to_tensor("x.data", x_data), to_tensor("x.scales", x_scales)};
    const ScaledTensor out{to_tensor("rows.data", rows), to_tensor("rows.scales", scales)};
    phalanx::permute(x, routing, out, to_bool("zero_padding", zero_padding), to_stream(x.data.device, stream));
  });
}

void route_and_permute(AnyView x_data, AnyView x_scales, AnyView topk_idx, AnyView counts, AnyView offsets,
                       AnyView slots, AnyView sources, AnyView needed, AnyView rows, AnyView scales,
                       AnyView zero_padding, std::int64_t alignment, std::int64_t max_rows,
                       Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor topk = to_tensor("topk_idx", topk_idx);
    const Routing routing = to_routing(counts, offsets, slots, sources, needed);
    const RouteOptions options = route_options(alignment, max_rows, to_stream(topk.device, stream));
    if (x_scales == nullptr)
      return phalanx::route_and_permute(to_tensor("x", x_data), topk, routing, to_tensor("rows", rows),
                                        to_bool("zero_padding", zero_padding), options);
    const ScaledTensor x{to_tensor("x.data", x_data), to_tensor("x.scales", x_scales)};
    const ScaledTensor out{to_tensor("rows.data", rows), to_tensor("rows.scales", scales)};
    phalanx::route_and_permute(x, topk, routing, out, to_bool("zero_padding", zero_padding), options);
  });
}

void unpermute(AnyView rows, AnyView slots, AnyView sources, AnyView weights, AnyView residual, AnyView out,
               Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor result = to_tensor("out", out);
    UnpermuteOptions options;
    options.weights = to_optional("weights", weights);
    options.residual = to_optional("residual", residual);
    options.stream = to_stream(result.device, stream);
    phalanx::unpermute(to_tensor("rows", rows), to_routing(slots, sources), result, options);
  });
}

void unpermute_backward(AnyView grad_out, AnyView slots, AnyView sources, AnyView weights, AnyView rows,
                        AnyView grad_rows, AnyView grad_weights, AnyView zero_padding, Optional<std::int64_t> stream) {
  translating_errors([&] {
    const Tensor grad = to_tensor("grad_out", grad_out);
    UnpermuteBackwardOptions options;
    options.weights = to_optional("weights", weights);
    options.rows = to_optional("rows", rows);
    options.grad_weights = to_optional("grad_weights", grad_weights);
    options.zero_padding = to_bool("zero_padding", zero_padding);
    options.stream = to_stream(grad.device, stream);
    phalanx::unpermute_backward(grad, to_routing(slots, sources), to_tensor("grad_rows", grad_rows), options);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, route)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(permute, permute)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route_and_permute, route_and_permute)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(unpermute, unpermute)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(unpermute_backward, unpermute_backward)

}  // namespace phalanx::python
