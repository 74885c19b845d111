// The experts of a layer, forward, in one call: what phalanx.nn runs where nothing is recorded. Six operations and one
// piece of memory, so that the host's share is the launches'.
#include <string>

#include "bindings/convert.h"

namespace phalanx::python {
namespace {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// Everything between x and y. Without memory it only counts the bytes.
class Buffers {
 public:
  struct Sizes {
    std::int64_t tokens, topk, experts, hidden, intermediate;

    std::int64_t rows() const { return tokens * topk; }
  };

  Buffers(const Sizes& sizes, void* memory, const Device& device)
      : memory_(static_cast<char*>(memory)), device_(device) {
    x = quantized(sizes.tokens, sizes.hidden);
    rows = quantized(sizes.rows(), sizes.hidden);
    gates_and_ups = matrix(DType::bf16, sizes.rows(), 2 * sizes.intermediate);
    act = quantized(sizes.rows(), sizes.intermediate);
    out_rows = matrix(DType::bf16, sizes.rows(), sizes.hidden);
    routing = {vector(sizes.experts), vector(sizes.experts + 1), matrix(DType::int32, sizes.tokens, sizes.topk),
               vector(sizes.rows()), vector(1)};
  }

  std::int64_t num_bytes() const { return used_; }

  ScaledTensor x, rows, act;
  Tensor gates_and_ups, out_rows;
  Routing routing;

 private:
  void* take(std::int64_t bytes) {
    void* address = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(bytes, 256);
    return address;
  }
  Tensor matrix(DType dtype, std::int64_t rows, std::int64_t cols) {
    return row_major(take(rows * cols * size_of(dtype)), dtype, rows, cols, device_);
  }
  Tensor vector(std::int64_t size) { return {take(4 * size), DType::int32, device_, 1, {size}, {1}}; }
  // Scales MN-major, columns padded to 16 bytes so that TMA can read them.
  ScaledTensor quantized(std::int64_t rows, std::int64_t cols) {
    const std::int64_t columns = (cols + 127) / 128, pitch = round_up(rows, 4);
    const Tensor data = matrix(DType::e4m3, rows, cols);
    return {data, col_major(take(4 * columns * pitch), DType::f32, rows, columns, device_, pitch)};
  }

  char* memory_;
  Device device_;
  std::int64_t used_ = 0;
};

std::int64_t expert_mlp_bytes(std::int64_t tokens, std::int64_t topk, std::int64_t experts, std::int64_t hidden,
                              std::int64_t intermediate) {
  return Buffers({tokens, topk, experts, hidden, intermediate}, nullptr, {}).num_bytes();
}

/// A shape that the workspace was sized for.
void check_shape(const char* name, const Tensor& x, std::int64_t rows, std::int64_t cols, const char* meaning) {
  if (x.ndim == 2 && x.rows() == rows && x.cols() == cols) return;
  std::string shape;
  for (int i = 0; i < x.ndim; ++i) shape += (i == 0 ? "" : ", ") + std::to_string(x.shape[i]);
  throw Error(ErrorCode::invalid_argument, std::string(name) + ": shape [" + shape + "]; expected [" +
                                               std::to_string(rows) + ", " + std::to_string(cols) + "], that is " +
                                               meaning);
}

// `workspace`: int32, at least expert_mlp_bytes.
void expert_mlp(AnyView x_array, AnyView topk_idx_array, AnyView weights, AnyView gate_up_data, AnyView gate_up_scales,
                AnyView down_data, AnyView down_scales, AnyView out_array, AnyView workspace,
                Optional<std::int64_t> stream_handle) {
  translating_errors([&] {
    const Tensor x = to_tensor("x", x_array), topk_idx = to_tensor("topk_idx", topk_idx_array);
    const ScaledTensor gate_up{to_tensor("gate_up", gate_up_data), to_tensor("gate_up.scales", gate_up_scales)};
    const ScaledTensor down{to_tensor("down", down_data), to_tensor("down.scales", down_scales)};
    const Tensor topk_weights = to_tensor("topk_weights", weights);
    const Buffers::Sizes sizes{topk_idx.rows(), topk_idx.cols(), down.data.shape[0], down.data.shape[1],
                               down.data.shape[2]};
    check_shape("x", x, sizes.tokens, sizes.hidden, "[T, hidden] with the T of topk_idx");
    check_shape("topk_weights", topk_weights, sizes.tokens, sizes.topk, "that of topk_idx");
    const Stream stream = to_stream(x.device, stream_handle);
    const Buffers b(sizes, to_tensor("workspace", workspace).data, x.device);
    quantize_route_and_permute(x, b.x, topk_idx, b.routing, b.rows, true, {.stream = stream});
    GroupedSwigluOptions swiglu;
    swiglu.gates_and_ups = b.gates_and_ups;
    swiglu.stream = stream;
    grouped_gemm_fp8_swiglu(b.rows, gate_up, b.routing.offsets, b.act, swiglu);
    grouped_gemm_fp8(b.act, down, b.routing.offsets, b.out_rows, {.stream = stream});
    UnpermuteOptions options;
    options.weights = topk_weights;
    options.stream = stream;
    unpermute(b.out_rows, b.routing, to_tensor("out", out_array), options);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(expert_mlp_bytes, expert_mlp_bytes)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(expert_mlp, expert_mlp)

}  // namespace phalanx::python
