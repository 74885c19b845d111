// check -> plan -> run, on the CPU or on CUDA.
#include "phalanx/grouped.h"

#include "cpu/cpu.h"
#include "ops/check.h"

namespace phalanx {
namespace {

[[noreturn]] void run_on_cuda() { throw Error(ErrorCode::unsupported, "grouped products are not on CUDA yet"); }

}  // namespace

void grouped_gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                      const GroupedGemmOptions& options) {
  check_grouped_gemm("grouped_gemm_fp8", RowGroups::offsets, a, b, offsets, d, options);
  if (d.device.type == DeviceType::cuda) run_on_cuda();
  cpu::grouped_gemm_fp8(a, b, offsets, d);
}

void grouped_gemm_fp8_indexed(const ScaledTensor& a, const ScaledTensor& b, const Tensor& row_groups, const Tensor& d,
                              const GroupedGemmOptions& options) {
  check_grouped_gemm("grouped_gemm_fp8_indexed", RowGroups::row_groups, a, b, row_groups, d, options);
  if (d.device.type == DeviceType::cuda) run_on_cuda();
  cpu::grouped_gemm_fp8_indexed(a, b, row_groups, d);
}

void grouped_gemm_fp8_masked(const ScaledTensor& a, const ScaledTensor& b, const Tensor& counts, const Tensor& d,
                             const GroupedGemmOptions& options) {
  check_grouped_gemm("grouped_gemm_fp8_masked", RowGroups::counts, a, b, counts, d, options);
  if (d.device.type == DeviceType::cuda) run_on_cuda();
  cpu::grouped_gemm_fp8_masked(a, b, counts, d);
}

void wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const WgradOptions& options) {
  check_wgrad("wgrad_fp8", a, b, nullptr, d, options);
  if (d.device.type == DeviceType::cuda) run_on_cuda();
  cpu::wgrad_fp8(a, b, d, options.accumulate);
}

void grouped_wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                       const WgradOptions& options) {
  check_wgrad("grouped_wgrad_fp8", a, b, &offsets, d, options);
  if (d.device.type == DeviceType::cuda) run_on_cuda();
  cpu::grouped_wgrad_fp8(a, b, offsets, d, options.accumulate);
}

void check_groups(Device) {}

}  // namespace phalanx
