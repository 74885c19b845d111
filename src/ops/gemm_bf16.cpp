// check -> plan -> run, on the CPU or on CUDA: one product of BF16, or those of groups that only the device knows.
#include "phalanx/gemm_bf16.h"

#include <algorithm>
#include <string>

#include "cpu/gemm_bf16.h"
#include "ops/check_bf16.h"
#include "ops/group_faults.h"
#include "ops/launch_gemm.h"
#include "plan/bf16.h"

namespace phalanx {
namespace {

using std::int64_t;

struct PlanKey {
  plan::Bf16Problem problem;
  int num_sms, device;

  friend bool operator==(const PlanKey&, const PlanKey&) = default;
  std::size_t hash() const {
    const plan::GroupedProblem& p = problem.shape;
    return hash_of(int(p.grouping), p.num_groups, p.m, p.n, p.k, p.expected_rows, int(p.out), int(problem.major_a),
                   int(problem.major_b), problem.batch_invariant, num_sms, device);
  }
};

PlannedGemm planned(const PlanKey& key) {
  static auto& cache = *new PlanCache<PlanKey>;
  if (const char* text = tuning_config()) {
    const auto plan = plan::parse_bf16_plan(text, key.problem, key.num_sms);
    if (!plan)
      throw Error(ErrorCode::invalid_argument,
                  std::string("PHALANX_GEMM_CONFIG is not a valid configuration: ") + text);
    return with_kernel(*plan, key.device);
  }
  return cache.get(key, [&] { return with_kernel(plan::plan_bf16(key.problem, key.num_sms), key.device); });
}

OutType out_type(const Tensor& d) { return d.dtype == DType::bf16 ? OutType::bf16 : OutType::f32; }

/// A or B, [.., rows, K] of either major, as its kernel sees it: K-major in boxes of some rows, MN-major of one panel.
struct Operand {
  Major major;
  Rows lines;

  explicit Operand(const Tensor& x) : major(major_of(x)), lines(major == Major::k ? x : transposed(x)) {}
  TensorMap map(int rows) const { return lines.map(major == Major::k ? rows : kBf16BlockK, kPanelRows); }
};
static_assert(kBf16BlockK == kPanelRows, "the box of a K-major operand is as wide");

GemmParams operands(const GemmConfig& config, const Operand& a, const Operand& b, int rows_a) {
  GemmParams p{};
  p.rows_a = rows_a;
  p.a = a.map(rows_a / config.cluster_n);
  p.b = b.map(config.block_n / config.cluster_m);
  return p;
}

void run_dense(const Tensor& a, const Tensor& b, const Tensor& d, const GemmOptions& options) {
  const Place place(d, options.num_sms);
  const int m = int(d.rows()), n = int(d.cols()), k = int(a.cols());
  const Operand of_a(a), of_b(b);
  const cuda::ContextGuard context(place.ordinal);
  const plan::Bf16Problem problem{
      {Grouping::none, 1, m, n, k, 0, out_type(d)}, of_a.major, of_b.major, options.batch_invariant};
  const PlannedGemm chosen = planned({problem, place.num_sms, place.ordinal});
  const GemmConfig& config = chosen.plan.config;

  // For few rows, a box of those alone, as in gemm_fp8.
  const bool whole = config.cluster_n > 1 || of_a.major == Major::mn;
  GemmParams p = operands(config, of_a, of_b, whole ? config.block_m : std::min(config.block_m, m));
  const Rows d_rows(d);
  if (config.stores_by_tma()) p.d = d_rows.map(config.consumer_rows(), config.panel_columns());
  p.d_ptr = d.data, p.d_stride = row_stride(d);
  if (options.c) {
    if (config.stores_by_tma()) p.c = Rows(*options.c).map(config.consumer_rows(), config.panel_columns());
    p.c_ptr = options.c->data, p.c_stride = row_stride(*options.c);
  }
  p.m = m, p.n = n, p.k = k;
  launch(chosen, p, place, options.stream);
}

void run_rows(GroupsBy by, const Tensor& a, const Tensor& b, const Tensor& groups, const Tensor& d,
              const GroupedGemmOptions& options) {
  const Place place(d, options.num_sms);
  throw_fault(place.ordinal);
  const GroupedSizes s(by, a, b);
  if (s.m == 0) return;

  const Operand of_b(b);
  const cuda::ContextGuard context(place.ordinal);
  const plan::Bf16Problem problem{
      {Grouping::rows, s.num_groups, s.planned_m(), s.n, s.k, options.expected_rows, out_type(d)},
      Major::k,
      of_b.major};
  const PlannedGemm chosen = planned({problem, place.num_sms, place.ordinal});
  const GemmConfig& config = chosen.plan.config;

  const Rows a_rows(a), d_rows(d);
  GemmParams p = operands(config, Operand(a), of_b, config.block_m);
  if (config.stores_by_tma()) p.d = d_rows.map(config.consumer_rows(), config.panel_columns());
  p.d_ptr = d.data, p.d_stride = row_stride(d_rows.matrix);
  p.m = int(s.m), p.n = s.n, p.k = s.k;
  p.groups = groups_of(by, &groups, s.num_groups, s.limit, place);
  p.groups.a_pitch = a_rows.pitch, p.groups.b_pitch = of_b.lines.pitch, p.groups.d_pitch = d_rows.pitch;
  launch(chosen, p, place, options.stream);
}

void run_columns(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d,
                 const WgradOptions& options) {
  const Place place(d, options.num_sms);
  throw_fault(place.ordinal);
  const int num_groups = int(d.shape[0]), m = int(a.cols()), n = int(b.cols()), tokens = int(a.rows());
  if (tokens == 0 && options.accumulate) return;

  const cuda::ContextGuard context(place.ordinal);
  const plan::Bf16Problem problem{{Grouping::columns, num_groups, m, n, tokens, 0, OutType::f32}, Major::mn, Major::mn};
  const PlannedGemm chosen = planned({problem, place.num_sms, place.ordinal});
  const GemmConfig& config = chosen.plan.config;

  const Rows d_rows(d);
  GemmParams p{};
  p.rows_a = config.block_m;
  if (tokens > 0)  // else nothing is read
    p.a = Rows(a).map(kBf16BlockK, kPanelRows), p.b = Rows(b).map(kBf16BlockK, kPanelRows);
  p.d_ptr = d.data, p.d_stride = row_stride(d_rows.matrix);
  p.d = d_rows.map(64, kGradientColumns);
  if (options.accumulate) p.c_ptr = d.data, p.c_stride = p.d_stride;
  p.m = m, p.n = n, p.k = tokens;
  p.groups = groups_of(GroupsBy::offsets, &offsets, num_groups, tokens, place);
  p.groups.d_pitch = d_rows.pitch;
  launch(chosen, p, place, options.stream);
}

using RowsOnCpu = void(const Tensor& a, const Tensor& b, const Tensor& groups, const Tensor& d, bool batch_invariant);

void multiply_rows(const char* op, GroupsBy by, const Tensor& a, const Tensor& b, const Tensor& groups, const Tensor& d,
                   const GroupedGemmOptions& options, RowsOnCpu* on_cpu) {
  check_grouped_gemm_bf16(op, by, a, b, groups, d, options);
  if (d.device.type == DeviceType::cuda)
    run_rows(by, a, b, groups, d, options);
  else
    on_cpu(a, b, groups, d, options.batch_invariant);
}

}  // namespace

void gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& d, const GemmOptions& options) {
  check_gemm_bf16(a, b, d, options);
  if (d.rows() == 0) return;
  if (d.device.type == DeviceType::cuda)
    run_dense(a, b, d, options);
  else
    cpu::gemm_bf16(a, b, d, options.c ? &*options.c : nullptr, options.batch_invariant);
}

void grouped_gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d,
                       const GroupedGemmOptions& options) {
  multiply_rows("grouped_gemm_bf16", GroupsBy::offsets, a, b, offsets, d, options, cpu::grouped_gemm_bf16);
}

void grouped_gemm_bf16_indexed(const Tensor& a, const Tensor& b, const Tensor& row_groups, const Tensor& d,
                               const GroupedGemmOptions& options) {
  multiply_rows("grouped_gemm_bf16_indexed", GroupsBy::row_groups, a, b, row_groups, d, options,
                cpu::grouped_gemm_bf16_indexed);
}

void grouped_gemm_bf16_masked(const Tensor& a, const Tensor& b, const Tensor& counts, const Tensor& d,
                              const GroupedGemmOptions& options) {
  multiply_rows("grouped_gemm_bf16_masked", GroupsBy::counts, a, b, counts, d, options, cpu::grouped_gemm_bf16_masked);
}

void grouped_wgrad_bf16(const Tensor& a, const Tensor& b, const Tensor& offsets, const Tensor& d,
                        const WgradOptions& options) {
  check_grouped_wgrad_bf16(a, b, offsets, d, options);
  if (d.device.type == DeviceType::cuda)
    run_columns(a, b, offsets, d, options);
  else
    cpu::grouped_wgrad_bf16(a, b, offsets, d, options.accumulate);
}

}  // namespace phalanx
