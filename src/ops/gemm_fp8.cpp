// check -> plan -> run, on the CPU or on CUDA.
#include <algorithm>
#include <fstream>
#include <iterator>

#include "cpu/cpu.h"
#include "jit/log.h"
#include "ops/check.h"
#include "ops/launch_gemm.h"
#include "phalanx/gemm.h"
#include "plan/plan.h"
#include "plan/tuned.h"

namespace phalanx {
namespace {

struct PlanKey {
  plan::GemmProblem problem;
  int num_sms, device;

  friend bool operator==(const PlanKey&, const PlanKey&) = default;
  std::size_t hash() const {
    const plan::GemmProblem& p = problem;
    return hash_of(p.m, p.n, p.k, p.out, p.batch_invariant, p.all_sms, p.constant_b, num_sms, device);
  }
};

// What `phalanx tune` has kept. A file that cannot be read is as good as none, and named once.
const plan::TunedGemms& tuned_gemms() {
  static const plan::TunedGemms& tuned = *new plan::TunedGemms([] {
    const auto path = jit::tuned_path();
    std::ifstream file(path);
    if (!file) return plan::TunedGemms{};
    try {
      return plan::TunedGemms::from_json(std::string(std::istreambuf_iterator<char>(file), {}));
    } catch (const std::exception& error) {
      jit::log_warning(path.string() + ": not what phalanx tune writes, passed over: " + error.what());
      return plan::TunedGemms{};
    }
  }());
  return tuned;
}

// The measured plan, else the planner's. A measured one may split K as it likes.
plan::GemmPlan make_plan(const PlanKey& key) {
  if (!key.problem.batch_invariant)
    if (const auto plan = tuned_gemms().find(cuda::device(key.device).name, key.problem, key.num_sms)) return *plan;
  return plan::plan_gemm(key.problem, key.num_sms);
}

PlannedGemm planned_gemm(const PlanKey& key) {
  static auto& plans = *new PlanCache<PlanKey>;
  return plans.get(key, [&] { return with_kernel(make_plan(key), key.device); });
}

PlannedGemm tuned_gemm(const PlanKey& key) {
  const char* text = tuning_config();
  if (!text) return planned_gemm(key);
  const auto plan = plan::parse_plan(text, key.problem, key.num_sms);
  if (!plan)
    throw Error(ErrorCode::invalid_argument, std::string("PHALANX_GEMM_CONFIG is not a valid configuration: ") + text);
  return with_kernel(*plan, key.device);
}

// Scales of A that TMA can read: MN-major, aligned. Their view is transposed: TMA copies `block_m` of them at a time.
bool tma_reads(const Tensor& scales) {
  return (scales.strides[0] == 1 || scales.rows() == 1) && reinterpret_cast<std::uintptr_t>(scales.data) % 16 == 0 &&
         (scales.cols() == 1 || (scales.strides[1] % 4 == 0 && scales.strides[1] >= scales.rows()));
}

// Weights that few CTAs read, at the same time, are the first to leave L2: what others wrote there then need not be
// written back meanwhile, 3 to 15 % of the time of large weights. With many rows, they would have to come again.
bool leave_l2_first(const GemmConfig& config, int m, int n, int k) {
  constexpr int kFewTiles = 3;
  constexpr int64_t kLarge = 8 << 20;  // bytes
  return ceil_div(m, config.block_m) <= kFewTiles && int64_t(n) * k >= kLarge;
}

void run_on_cuda(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const GemmOptions& options) {
  const Place place(d, options.num_sms);
  const int m = int(d.rows()), n = int(d.cols()), k = int(a.data.cols());
  const OutType out = d.dtype == DType::bf16 ? OutType::bf16 : OutType::f32;

  const cuda::ContextGuard context(place.ordinal);
  const PlannedGemm chosen = tuned_gemm(
      {{m, n, k, out, options.batch_invariant, place.all_sms, options.constant_b}, place.num_sms, place.ordinal});
  const GemmConfig& config = chosen.plan.config;

  GemmParams p{};
  // Boxes of the rows that there are alone: TMA takes longer to fill with zeros than to copy (docs/tuning.md). What
  // shared memory holds in the others' place only reaches rows of D that are not stored.
  const int slice = config.block_m / config.cluster_n, last = m % slice;
  p.rows_a = std::min(config.block_m, m);
  p.a = Rows(a.data).map(std::min(slice, m), kBlockK);
  p.a_last = last != 0 && m > slice ? Rows(a.data).map(last, kBlockK) : p.a;
  const bool once = m <= config.block_m && reads_b_once(config);
  p.b = Rows(b.data).map(config.block_n / config.cluster_m, kBlockK, once);
  if (config.stores_by_tma()) {
    p.d = Rows(d).map(config.consumer_rows(), config.panel_columns());
    if (options.c) p.c = Rows(*options.c).map(config.consumer_rows(), config.panel_columns());
  }
  p.constant_b = options.constant_b, p.streams_b = leave_l2_first(config, m, n, k);
  p.sfa_by_tma = tma_reads(a.scales);
  if (p.sfa_by_tma) {
    const std::int64_t column_bytes = a.scales.cols() > 1 ? a.scales.strides[1] * 4 : 16;
    p.sfa_map = cuda::make_tensor_map({DType::f32, a.scales.data, a.scales.cols(), m, column_bytes, 1, config.block_m});
  }
  p.sfa = static_cast<const float*>(a.scales.data);
  p.sfb = static_cast<const float*>(b.scales.data);
  p.sfa_stride_m = a.scales.strides[0], p.sfa_stride_k = a.scales.strides[1];
  p.sfb_stride_n = b.scales.strides[0], p.sfb_stride_k = b.scales.strides[1];
  p.d_ptr = d.data, p.d_stride = row_stride(d);
  if (options.c) p.c_ptr = options.c->data, p.c_stride = row_stride(*options.c);
  p.m = m, p.n = n, p.k = k;
  launch(chosen, p, place, options.stream);
}

}  // namespace

void gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const GemmOptions& options) {
  check_gemm_fp8(a, b, d, options);
  if (d.rows() == 0) return;
  if (d.device.type == DeviceType::cuda)
    run_on_cuda(a, b, d, options);
  else
    cpu::gemm_fp8(a, b, d, options.c ? &*options.c : nullptr, options.batch_invariant);
}

}  // namespace phalanx
