// check -> plan -> run, on the CPU or on CUDA: products whose groups only the device knows.
#include "phalanx/grouped.h"

#include <algorithm>
#include <optional>
#include <string>

#include "cpu/cpu.h"
#include "cuda/cuda.h"
#include "device/gemm/params.h"
#include "device/moe/gemm_swiglu.h"
#include "ops/check.h"
#include "ops/group_faults.h"
#include "ops/launch_gemm.h"
#include "ops/plan_cache.h"
#include "ops/scaled_matrix.h"
#include "phalanx/activation.h"
#include "plan/grouped.h"

namespace phalanx {
namespace {

using std::int64_t;

static_assert(kMaxGroups == kMaxTableGroups);

// --- plans -----------------------------------------------------------------------------------------------------------

struct PlanKey {
  plan::GroupedProblem problem;
  int num_sms, device;
  bool either = false;  ///< of gates and ups: a product to BF16 will do as well

  friend bool operator==(const PlanKey&, const PlanKey&) = default;
  std::size_t hash() const {
    const plan::GroupedProblem& p = problem;
    return hash_of(int(p.grouping), p.num_groups, p.m, p.n, p.k, p.expected_rows, int(p.out), p.all_sms, num_sms,
                   device, either);
  }
};

// What PHALANX_GEMM_CONFIG says, if it says something.
std::optional<plan::GemmPlan> tuned_plan(const PlanKey& key) {
  const char* text = tuning_config();
  if (!text) return std::nullopt;
  const plan::GroupedProblem& problem = key.problem;
  const auto parsed = plan::parse_config(text, {.out = problem.out, .grouping = problem.grouping});
  if (!parsed || parsed->config.split_k > 1)
    throw Error(ErrorCode::invalid_argument, std::string("PHALANX_GEMM_CONFIG is not a valid configuration: ") + text);
  return plan::plan_grouped_with(parsed->config, parsed->group_m, problem, key.num_sms);
}

PlannedGemm planned(const PlanKey& key) {
  static auto& cache = *new PlanCache<PlanKey>;
  if (const auto plan = tuned_plan(key)) return with_kernel(*plan, key.device);
  return cache.get(key, [&] {
    plan::GroupedProblem problem = key.problem;
    if (key.either && !plan::swiglu_in_epilogue(problem, key.num_sms)) problem.out = OutType::bf16;
    return with_kernel(plan::plan_grouped(problem, key.num_sms), key.device);
  });
}

// --- operands --------------------------------------------------------------------------------------------------------

// Scales of a matrix's rows, or of each in a stack, as TMA can read them if it can: columns (one k-block each)
// contiguous and 16-byte aligned. The tensor map shows them transposed: group g begins at column g * pitch_x and row g
// * pitch_y.
struct ScaleColumns {
  bool by_tma = false;
  cuda::TensorMapSpec spec{};
  int pitch_x = 0, pitch_y = 0;

  ScaleColumns(const Tensor& x, int box) {
    const bool stacked = x.ndim == 3;
    const int64_t groups = stacked ? x.shape[0] : 1, rows = x.shape[x.ndim - 2], columns = x.shape[x.ndim - 1];
    const int64_t group = stacked ? x.strides[0] : 0;
    int64_t column = x.strides[x.ndim - 1];
    if ((x.strides[x.ndim - 2] != 1 && rows > 1) || reinterpret_cast<std::uintptr_t>(x.data) % 16 != 0) return;
    if (columns == 1) column = groups > 1 ? group : (rows + 3) / 4 * 4;
    if (column % 4 != 0 || column < rows) return;
    int64_t width = rows, height = columns;
    if (groups > 1) {
      if (group % column == 0 && group / column >= columns) {  // group after group
        height = (groups - 1) * (group / column) + columns;
      } else if (group >= rows && (groups - 1) * group + rows <= column) {  // side by side in long columns
        width = (groups - 1) * group + rows;
      } else {
        return;
      }
      if (std::max(width, height) > int64_t{1} << 30) return;  // kernels count them in 32 bits
      (height > columns ? pitch_y : pitch_x) = int(height > columns ? group / column : group);
    }
    by_tma = true;
    spec = {DType::f32, x.data, height, width, column * 4, 1, box};
  }

  TensorMap map() const { return by_tma ? cuda::make_tensor_map(spec) : TensorMap{}; }
};

const float* floats(const Tensor& x) { return static_cast<const float*>(x.data); }

// --- launches --------------------------------------------------------------------------------------------------------

constexpr int kFewEmpty = 4;  // rows of a group, on average, from which on less than one in fifty has none

// A product of rows in groups: its kernel, and all that this wants but where the result goes.
struct RowsProduct {
  Place place;
  PlannedGemm chosen{};
  GemmParams params{};

  RowsProduct(GroupsBy by, const ScaledTensor& a, const ScaledTensor& b, const Tensor& groups, OutType out, bool either,
              int num_sms, int expected_rows)
      : place(a.data, num_sms) {
    throw_fault(place.ordinal);
    const GroupedSizes s(by, a.data, b.data);
    if (s.m == 0) return;

    const cuda::ContextGuard context(place.ordinal);
    const plan::GroupedProblem problem{Grouping::rows, s.num_groups, s.planned_m(), s.n, s.k,
                                       expected_rows,  out,          place.all_sms};
    chosen = planned({problem, place.num_sms, place.ordinal, either});
    const Rows a_rows(a.data), b_rows(b.data);
    const ScaleColumns sfa(a.scales, config().scales_a_box());
    GemmParams& p = params;
    p.rows_a = config().block_m;
    p.a = a_rows.map(config().block_m / config().cluster_n, kBlockK);
    if (config().slices_last_rows()) p.a_last = a_rows.map(config().rows_of_request(), kBlockK);
    p.b = b_rows.map(config().rows_of_request_b(), kBlockK, reads_b_once(config()));
    p.sfa_by_tma = sfa.by_tma;
    p.sfa_map = sfa.map();
    p.sfa = floats(a.scales), p.sfb = floats(b.scales);
    const auto& sa = a.scales.strides;
    p.sfa_stride_m = sa[a.scales.ndim - 2], p.sfa_stride_k = sa[a.scales.ndim - 1];
    p.sfb_stride_n = b.scales.strides[1], p.sfb_stride_k = b.scales.strides[2];
    p.m = int(s.m), p.n = s.n, p.k = s.k;
    p.streams_b = plan::weights_leave_l2_first(config(), problem);
    const int64_t rows_each = expected_rows > 0 ? expected_rows : s.m / s.num_groups;
    p.groups = groups_of(by, &groups, s.num_groups, s.limit, place);
    p.groups.a_pitch = a_rows.pitch, p.groups.b_pitch = b_rows.pitch;
    p.groups.sfa_pitch_x = sfa.pitch_x, p.groups.sfa_pitch_y = sfa.pitch_y;
    p.groups.sfa_stride_g = s.masked ? sa[0] : 0, p.groups.sfb_stride_g = b.scales.strides[0];
    p.groups.one_tile_each = rows_each >= kFewEmpty && rows_each <= config().block_m;
  }

  const GemmConfig& config() const { return chosen.plan.config; }
  bool has_rows() const { return chosen.kernel != nullptr; }

  void run_to(const Tensor& d, Stream stream) {
    const cuda::ContextGuard context(place.ordinal);
    const Rows d_rows(d);
    if (config().stores_by_tma()) params.d = d_rows.map(config().consumer_rows(), config().panel_columns());
    params.d_ptr = d.data, params.d_stride = row_stride(d_rows.matrix);
    params.groups.d_pitch = d_rows.pitch;
    launch(chosen, params, place, stream);
  }
};

void run_rows(GroupsBy by, const ScaledTensor& a, const ScaledTensor& b, const Tensor& groups, const Tensor& d,
              const GroupedGemmOptions& options) {
  const OutType out = d.dtype == DType::bf16 ? OutType::bf16 : OutType::f32;
  RowsProduct product(by, a, b, groups, out, false, options.num_sms, options.expected_rows);
  if (product.has_rows()) product.run_to(d, options.stream);
}

void run_swiglu(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const ScaledTensor& q,
                const GroupedSwigluOptions& options) {
  const bool either = options.gates_and_ups.has_value();
  RowsProduct product(GroupsBy::offsets, a, b, offsets, OutType::swiglu, either, options.num_sms,
                      options.expected_rows);
  if (!product.has_rows()) return;
  if (!product.config().gates_and_ups()) {
    product.run_to(*options.gates_and_ups, options.stream);
    return swiglu_quantize(*options.gates_and_ups, q,
                           {.limit = options.limit,
                            .weights = options.weights,
                            .pow2_scales = options.pow2_scales,
                            .stream = options.stream});
  }
  GemmSwigluParams p{.gemm = product.params,
                     .q = scaled_matrix(q),
                     .weights = options.weights ? floats(*options.weights) : nullptr,
                     .weight_stride = options.weights ? options.weights->strides[0] : 0,
                     .limit = options.limit,
                     .pow2_scales = options.pow2_scales};
  const cuda::ContextGuard context(product.place.ordinal);
  launch(product.chosen, &p, p.gemm, product.place, options.stream);
}

// Without offsets: one group of all columns.
void run_columns(const ScaledTensor& a, const ScaledTensor& b, const Tensor* offsets, const Tensor& d,
                 const WgradOptions& options) {
  const Place place(d, options.num_sms);
  throw_fault(place.ordinal);
  const int num_groups = offsets ? int(d.shape[0]) : 1;
  const int m = int(a.data.rows()), n = int(b.data.rows()), k = int(a.data.cols());
  if (k == 0 && options.accumulate) return;

  const cuda::ContextGuard context(place.ordinal);
  const plan::GroupedProblem problem{Grouping::columns, num_groups, m, n, k, 0, OutType::f32, place.all_sms};
  const PlannedGemm chosen = planned({problem, place.num_sms, place.ordinal});
  const GemmConfig& config = chosen.plan.config;

  const Rows d_rows(d);
  const ScaleColumns sfa(a.scales, config.scales_a_box()), sfb(b.scales, config.block_n);
  GemmParams p{};
  p.rows_a = config.block_m;
  if (k > 0) {  // else nothing is read
    p.a = Rows(a.data).map(config.block_m / config.cluster_n, kBlockK);
    p.b = Rows(b.data).map(config.block_n / config.cluster_m, kBlockK);
    p.sfa_by_tma = sfa.by_tma && sfb.by_tma;
    p.sfa_map = sfa.map(), p.sfb_map = sfb.map();
  }
  p.sfa = floats(a.scales), p.sfb = floats(b.scales);
  p.sfa_stride_m = a.scales.strides[0], p.sfa_stride_k = a.scales.strides[1];
  p.sfb_stride_n = b.scales.strides[0], p.sfb_stride_k = b.scales.strides[1];
  p.d_ptr = d.data, p.d_stride = row_stride(d_rows.matrix);
  p.d = d_rows.map(64, kGradientColumns);
  if (options.accumulate) p.c_ptr = d.data, p.c_stride = p.d_stride;
  p.m = m, p.n = n, p.k = k;
  p.groups = groups_of(GroupsBy::offsets, offsets, num_groups, k, place);
  p.groups.d_pitch = d_rows.pitch;
  launch(chosen, p, place, options.stream);
}

using RowsOnCpu = void(const ScaledTensor& a, const ScaledTensor& b, const Tensor& groups, const Tensor& d,
                       bool batch_invariant);

void multiply_rows(const char* op, GroupsBy by, const ScaledTensor& a, const ScaledTensor& b, const Tensor& groups,
                   const Tensor& d, const GroupedGemmOptions& options, RowsOnCpu* on_cpu) {
  check_grouped_gemm(op, by, a, b, groups, d, options);
  if (d.device.type == DeviceType::cuda)
    run_rows(by, a, b, groups, d, options);
  else
    on_cpu(a, b, groups, d, options.batch_invariant);
}

}  // namespace

void grouped_gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                      const GroupedGemmOptions& options) {
  multiply_rows("grouped_gemm_fp8", GroupsBy::offsets, a, b, offsets, d, options, cpu::grouped_gemm_fp8);
}

void grouped_gemm_fp8_indexed(const ScaledTensor& a, const ScaledTensor& b, const Tensor& row_groups, const Tensor& d,
                              const GroupedGemmOptions& options) {
  multiply_rows("grouped_gemm_fp8_indexed", GroupsBy::row_groups, a, b, row_groups, d, options,
                cpu::grouped_gemm_fp8_indexed);
}

void grouped_gemm_fp8_masked(const ScaledTensor& a, const ScaledTensor& b, const Tensor& counts, const Tensor& d,
                             const GroupedGemmOptions& options) {
  multiply_rows("grouped_gemm_fp8_masked", GroupsBy::counts, a, b, counts, d, options, cpu::grouped_gemm_fp8_masked);
}

void grouped_gemm_fp8_swiglu(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const ScaledTensor& q,
                             const GroupedSwigluOptions& options) {
  check_grouped_swiglu(a, b, offsets, q, options);
  if (q.data.device.type == DeviceType::cuda)
    run_swiglu(a, b, offsets, q, options);
  else
    cpu::grouped_gemm_fp8_swiglu(a, b, offsets, q, options);
}

void wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const WgradOptions& options) {
  check_wgrad("wgrad_fp8", a, b, nullptr, d, options);
  if (d.device.type == DeviceType::cuda)
    run_columns(a, b, nullptr, d, options);
  else
    cpu::wgrad_fp8(a, b, d, options.accumulate);
}

void grouped_wgrad_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& offsets, const Tensor& d,
                       const WgradOptions& options) {
  check_wgrad("grouped_wgrad_fp8", a, b, &offsets, d, options);
  if (d.device.type == DeviceType::cuda)
    run_columns(a, b, &offsets, d, options);
  else
    cpu::grouped_wgrad_fp8(a, b, offsets, d, options.accumulate);
}

void check_groups(Device device) {
  if (device.type != DeviceType::cuda) return;
  cuda::device(device.index);  // there is one
  throw_fault(device.index);
}

}  // namespace phalanx
