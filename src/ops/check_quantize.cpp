#include "ops/check_quantize.h"

#include "ops/check_tensor.h"

namespace phalanx {
namespace {

using std::int64_t;

const char* name_of(QuantizeForm form) {
  switch (form) {
    case QuantizeForm::rows:
      return "quantize_rows";
    case QuantizeForm::blocks:
      return "quantize_blocks";
    case QuantizeForm::transposed:
      return "quantize_transposed";
    case QuantizeForm::both:
      break;
  }
  return "quantize_both";
}

void check_float_matrix(const Arg& arg, Access access) {
  check_matrix(arg);
  check_dtype(arg, {DType::bf16, DType::f16, DType::f32});
  check_rows(arg, access);
  check_base(arg, size_of(arg->dtype));
}

/// An output, of a shape that messages call `meaning`, made from `in`.
void check_quantized(const Arg& data, const Arg& scales, const Arg& in, int64_t rows, int64_t cols, const char* meaning,
                     bool by_blocks) {
  for (const Arg* arg : {&data, &scales}) {
    check_matrix(*arg);
    check_device(*arg, in);
  }
  check_dtype(data, DType::e4m3);
  check_dtype(scales, DType::f32);
  check_shape(data, {rows, cols}, meaning);
  const int64_t scale_rows = by_blocks ? ceil_div<int64_t>(rows, kQuantizeBlock) : rows;
  check_shape(scales, {scale_rows, ceil_div<int64_t>(cols, kQuantizeBlock)},
              by_blocks ? "one scale per 128 x 128 block" : "one scale per 1 x 128 block");
  check_rows(data, Access::write);
  check_base(data, 1);
  check_scales(scales, Access::write);
  check_disjoint(data, in);
  check_disjoint(scales, in);
  check_disjoint(scales, data);
}

/// FP32, one for each row of x.
void check_weights(const Arg& weights, const Arg& x, Access access) {
  check_rank(weights, 1);
  check_device(weights, x);
  check_dtype(weights, DType::f32);
  check_shape(weights, {x->rows()}, "[M], one for each row of x");
  check_base(weights, alignof(float));
  if (access == Access::write && x->rows() > 1 && weights->strides[0] == 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, weights, "its stride is 0: its elements overlap");
}

void check_gate_up(const Arg& x, const SwigluOptions& options) {
  check_float_matrix(x, Access::read);
  if (x->cols() % 2 != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, x, "it has {} columns, expected an even number: gate and up", x->cols());
  if (options.interleaved && x->cols() % 16 != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, x, "it has {} columns, expected a multiple of 16: 8 of gate and 8 of up in turn",
         x->cols());
  if (!(options.limit > 0)) [[unlikely]]
    throw Error(ErrorCode::invalid_argument,
                format_text("{}: options.limit is {}, expected more than 0", x.op, options.limit));
  if (options.weights) check_weights({x.op, "options.weights", *options.weights}, x, Access::read);
}

/// Two outputs, [rows, cols] and its transpose, of an operation that reads `in` and may read `options.weights`.
void check_quantized_both(const char* op, const ScaledTensor& q, const ScaledTensor& q_t, const Arg& in, int64_t rows,
                          int64_t cols, const char* meaning, const char* transposed, const SwigluOptions* options) {
  const Arg outputs[] = {{op, "q.data", q.data}, {op, "q.scales", q.scales}};
  const Arg outputs_t[] = {{op, "q_t.data", q_t.data}, {op, "q_t.scales", q_t.scales}};
  check_quantized(outputs[0], outputs[1], in, rows, cols, meaning, false);
  check_quantized(outputs_t[0], outputs_t[1], in, cols, rows, transposed, false);
  for (const Arg& output : outputs) {
    for (const Arg& other : outputs_t) check_disjoint(other, output);
  }
  if (!options || !options->weights) return;
  const Arg weights{op, "options.weights", *options->weights};
  for (const auto& pair : {outputs, outputs_t}) {
    check_disjoint(pair[0], weights);
    check_disjoint(pair[1], weights);
  }
}

}  // namespace

void check_quantize(QuantizeForm form, const Tensor& x, const ScaledTensor* q, const ScaledTensor* q_t) {
  const char* op = name_of(form);
  const Arg in{op, "x", x};
  constexpr const char *kMeaning = "the shape of x", *kTransposed = "the shape of x, transposed";
  check_float_matrix(in, Access::read);
  if (q && q_t) return check_quantized_both(op, *q, *q_t, in, x.rows(), x.cols(), kMeaning, kTransposed, nullptr);
  const ScaledTensor& out = q ? *q : *q_t;
  const Arg data{op, "q.data", out.data}, scales{op, "q.scales", out.scales};
  if (q)
    check_quantized(data, scales, in, x.rows(), x.cols(), kMeaning, form == QuantizeForm::blocks);
  else
    check_quantized(data, scales, in, x.cols(), x.rows(), kTransposed, false);
}

ScaleShape check_dequantize(const ScaledTensor& q, const Tensor& x) {
  constexpr const char* kOp = "dequantize";
  const Arg data{kOp, "q.data", q.data}, scales{kOp, "q.scales", q.scales}, out{kOp, "x", x};
  for (const Arg* arg : {&data, &scales, &out}) {
    check_matrix(*arg);
    check_device(*arg, data);
  }
  check_dtype(data, DType::e4m3);
  check_dtype(scales, DType::f32);
  check_dtype(out, {DType::bf16, DType::f16, DType::f32});
  check_shape(out, {q.data.rows(), q.data.cols()}, "the shape of q.data");

  const int64_t rows = q.data.rows(), row_blocks = ceil_div<int64_t>(rows, kQuantizeBlock);
  const int64_t col_blocks = ceil_div<int64_t>(q.data.cols(), kQuantizeBlock);
  if ((q.scales.rows() != rows && q.scales.rows() != row_blocks) || q.scales.cols() != col_blocks) [[unlikely]]
    fail(ErrorCode::invalid_argument, scales, "expected shape [{}, {}] (1 x 128 blocks) or [{}, {}] (128 x 128 blocks)",
         rows, col_blocks, row_blocks, col_blocks);
  check_rows(data, Access::read);
  check_base(data, 1);
  check_scales(scales, Access::read);
  check_rows(out, Access::write);
  check_base(out, size_of(x.dtype));
  check_disjoint(out, data);
  check_disjoint(out, scales);
  return q.scales.rows() == rows ? ScaleShape::row_1x128 : ScaleShape::block_128x128;
}

void check_swiglu_quantize(const Tensor& x, const ScaledTensor& q, const SwigluOptions& options) {
  constexpr const char* kOp = "swiglu_quantize";
  const Arg in{kOp, "x", x}, data{kOp, "q.data", q.data}, scales{kOp, "q.scales", q.scales};
  check_gate_up(in, options);
  check_quantized(data, scales, in, x.rows(), x.cols() / 2, "[M, I], half the columns of x", false);
  if (!options.weights) return;
  const Arg weights{kOp, "options.weights", *options.weights};
  check_disjoint(data, weights);
  check_disjoint(scales, weights);
}

void check_swiglu_backward(const Tensor& x, const Tensor& grad, const Tensor& grad_x, const Tensor* grad_weights,
                           const SwigluOptions& options) {
  constexpr const char* kOp = "swiglu_backward";
  const Arg in{kOp, "x", x}, grad_in{kOp, "grad", grad}, out{kOp, "grad_x", grad_x};
  check_gate_up(in, options);
  check_float_matrix(grad_in, Access::read);
  check_float_matrix(out, Access::write);
  for (const Arg* arg : {&grad_in, &out}) {
    check_device(*arg, in);
    check_dtype(*arg, x.dtype);
  }
  check_shape(grad_in, {x.rows(), x.cols() / 2}, "[M, I], half the columns of x");
  check_shape(out, {x.rows(), x.cols()}, "the shape of x");
  if (!same_memory(x, grad_x)) check_disjoint(out, in);
  check_disjoint(out, grad_in);
  if (options.weights) check_disjoint(out, {kOp, "options.weights", *options.weights});
  if (!grad_weights) return;
  const Arg sums{kOp, "grad_weights", *grad_weights};
  check_weights(sums, in, Access::write);
  for (const Arg* other : {&in, &grad_in, &out}) check_disjoint(sums, *other);
  if (options.weights) check_disjoint(sums, {kOp, "options.weights", *options.weights});
}

void check_swiglu_quantize_both(const Tensor& x, const ScaledTensor& q, const ScaledTensor& q_t,
                                const SwigluOptions& options) {
  constexpr const char* kOp = "swiglu_quantize_both";
  const Arg in{kOp, "x", x};
  check_gate_up(in, options);
  check_dtype(in, DType::bf16);
  check_quantized_both(kOp, q, q_t, in, x.rows(), x.cols() / 2, "[M, I], half the columns of x", "[I, M]", &options);
}

void check_swiglu_backward_both(const Tensor& x, const Tensor& grad, const ScaledTensor& q, const ScaledTensor& q_t,
                                const SwigluOptions& options) {
  constexpr const char* kOp = "swiglu_backward_both";
  const Arg in{kOp, "x", x}, grad_in{kOp, "grad", grad};
  check_gate_up(in, options);
  check_dtype(in, DType::bf16);
  if (x.cols() % 16 != 0) [[unlikely]]
    fail(ErrorCode::invalid_argument, in, "it has {} columns, expected a multiple of 16", x.cols());
  check_float_matrix(grad_in, Access::read);
  check_device(grad_in, in);
  check_dtype(grad_in, DType::bf16);
  check_shape(grad_in, {x.rows(), x.cols() / 2}, "[M, I], half the columns of x");
  check_quantized_both(kOp, q, q_t, in, x.rows(), x.cols(), "the shape of x", "the shape of x, transposed", &options);
  check_quantized_both(kOp, q, q_t, grad_in, x.rows(), x.cols(), "the shape of x", "the shape of x, transposed",
                       nullptr);
}

}  // namespace phalanx
