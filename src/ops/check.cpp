#include "ops/check.h"

#include "device/gemm/config.h"
#include "ops/check_tensor.h"
#include "text/text.h"

namespace phalanx {

using std::int64_t;

void check_gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const GemmOptions& options) {
  constexpr const char* kOp = "gemm_fp8";
  const Arg a_data{kOp, "a.data", a.data}, a_scales{kOp, "a.scales", a.scales};
  const Arg b_data{kOp, "b.data", b.data}, b_scales{kOp, "b.scales", b.scales};
  const Arg out{kOp, "d", d};

  for (const Arg* arg : {&a_data, &b_data, &a_scales, &b_scales, &out}) {
    check_matrix(*arg);
    check_device(*arg, a_data);
  }
  check_dtype(a_data, DType::e4m3);
  check_dtype(b_data, DType::e4m3);
  check_dtype(a_scales, DType::f32);
  check_dtype(b_scales, DType::f32);
  check_dtype(out, {DType::bf16, DType::f32});

  const int64_t m = a.data.rows(), k = a.data.cols(), n = b.data.rows();
  if (k < 1) [[unlikely]]
    fail(ErrorCode::invalid_argument, a_data, "K is {}, expected at least 1", k);
  if (n < 1) [[unlikely]]
    fail(ErrorCode::invalid_argument, b_data, "N is {}, expected at least 1", n);
  const int64_t k_blocks = ceil_div<int64_t>(k, kBlockK);
  check_shape(b_data, {n, k}, "[N, K] with the K of a.data");
  check_shape(a_scales, {m, k_blocks}, "[M, ceil(K / 128)]");
  check_shape(b_scales, {ceil_div<int64_t>(n, kScaleBlock), k_blocks}, "[ceil(N / 128), ceil(K / 128)]");
  check_shape(out, {m, n}, "[M, N]");

  check_tma(a_data);
  check_tma(b_data);
  check_tma(out);
  check_scales(a_scales, Access::read);
  check_scales(b_scales, Access::read);
  for (const Arg* input : {&a_data, &b_data, &a_scales, &b_scales}) check_disjoint(out, *input);

  if (options.c) check_addend({kOp, "options.c", *options.c}, out, a_data);
  if (options.num_sms < 0) [[unlikely]]
    throw Error(ErrorCode::invalid_argument,
                format_text("{}: options.num_sms is {}, expected 0 (all) or more", kOp, options.num_sms));
}

}  // namespace phalanx
