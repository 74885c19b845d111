// check -> run, on the CPU or on CUDA: the state that the ranks' operations share is in src/ep.
#include <atomic>
#include <cstring>

#include "cpu/ep.h"
#include "cuda/cuda.h"
#include "cuda/driver.h"
#include "device/ep/params.h"
#include "ep/group.h"
#include "ep/memory.h"
#include "jit/kernels.h"
#include "ops/check.h"
#include "ops/check_ep.h"
#include "ops/ep_shape.h"
#include "ops/kernel.h"
#include "phalanx/ep.h"
#include "text/text.h"

namespace phalanx {
namespace {

using std::int64_t;

/// Memory of the host in which kernels leave what went wrong.
std::shared_ptr<EpStatus> make_status(Device device) {
  if (device.type == DeviceType::cpu) return std::make_shared<EpStatus>();
  const cuda::ContextGuard context(device.index);
  void* memory = nullptr;
  PHALANX_CUDA(cuMemHostAlloc(&memory, sizeof(EpStatus), cuda::kMemHostAllocPortable | cuda::kMemHostAllocDeviceMap));
  std::memset(memory, 0, sizeof(EpStatus));
  return {static_cast<EpStatus*>(memory), [index = device.index](EpStatus* status) {
            cuda::release(index, [=] { cuda::driver().cuMemFreeHost(status); });
          }};
}

/// CTAs of a rank wait for each other, so all must be on the GPU at once; one fills an SM.
void check_sms(int num_ctas, const cuda::DeviceInfo& device) {
  if (num_ctas > device.num_sms)
    throw Error(ErrorCode::unsupported, format_text("config.num_sms is {}, expected at most {}, what {} has", num_ctas,
                                                    device.num_sms, device.name));
}

const char* awaited(int phase) {
  constexpr const char* kNames[] = {"nothing",
                                    "the peer to finish reading an earlier dispatch",
                                    "the peer's routing (dispatch)",
                                    "the peer's tokens (dispatch)",
                                    "the peer to finish reading an earlier combine",
                                    "the peer's sums (combine)"};
  return phase >= 0 && phase < static_cast<int>(std::size(kNames)) ? kNames[phase] : "?";
}

std::string format_name(std::uint64_t flag) {
  switch (ep_flag_format(flag)) {
    case kEpRouting:
      return "routing";
    case kEpE4m3:
      return "e4m3 tokens";
    case kEpBf16:
      return "bf16 tokens";
    case kEpQuantized:
      return "bf16 tokens as e4m3";
    case kEpSums:
      return "sums";
    case kEpSumsAndValues:
      return "sums and row_values";
    default:
      return "something unknown";
  }
}

/// What ranks compare at construction.
std::vector<std::pair<std::string, int64_t>> fields_of(const ExpertParallelConfig& c, const EpShape& shape) {
  std::vector<std::pair<std::string, int64_t>> fields = {{"hidden", c.hidden},
                                                         {"num_experts", c.num_experts},
                                                         {"topk", c.topk},
                                                         {"max_tokens", c.max_tokens},
                                                         {"dtype", static_cast<int>(c.dtype)},
                                                         {"latency", c.latency},
                                                         {"num_sms", shape.num_ctas},
                                                         {"alignment", c.alignment},
                                                         {"experts_per_rank", ssize(c.experts_per_rank)}};
  for (std::size_t r = 0; r < c.experts_per_rank.size(); ++r)
    fields.emplace_back(format_text("experts_per_rank[{}]", r), c.experts_per_rank[r]);
  return fields;
}

void compare_configs(ep::GroupState& group, const ExpertParallelConfig& config, const EpShape& shape) {
  const auto fields = fields_of(config, shape);
  std::string mine;
  for (const auto& [name, value] : fields) mine += format_text("{}={}\n", name, value);
  const auto all = group.all_gather(mine, "configurations to compare");
  const auto line = [](const std::string& text, std::size_t begin) {
    return text.substr(begin, text.find('\n', begin) - begin);
  };
  for (int r = 0; r < group.size; ++r) {
    if (all[r] == all[0]) continue;
    std::size_t begin = 0;
    while (line(all[0], begin) == line(all[r], begin)) begin = all[0].find('\n', begin) + 1;
    throw Error(ErrorCode::invalid_argument,
                format_text("ExpertParallel: the ranks' configurations differ: rank 0 has {}, rank {} has {}",
                            line(all[0], begin), r, line(all[r], begin)));
  }
}

}  // namespace

std::size_t expert_parallel_bytes(const ExpertParallelConfig& config, int num_ranks) {
  check_ep_config(config, num_ranks);
  return ep_layout(make_shape(config, num_ranks, DeviceType::cuda)).bytes;
}

struct ExpertParallel::Impl {
  Impl(const Group& joined, const ExpertParallelConfig& wanted) : group(joined), config(wanted) {
    ep::GroupState& g = *group.state();
    check_ep_config(config, g.size);
    const EpShape shape = make_shape(config, g.size, g.device.type);
    if (g.device.type == DeviceType::cuda) check_sms(shape.num_ctas, cuda::require_hopper(g.device.index));
    compare_configs(g, config, shape);

    status = make_status(g.device);
    common.shape = shape;
    common.layout = ep_layout(shape);
    const auto first = first_experts(config, g.size);
    std::copy(first.begin(), first.end(), common.first_expert);
    common.rank = g.rank;
    common.by = EpDivisors(shape, num_local_experts());
    common.handle_layout = ep_handle_layout(shape, num_local_experts(), config.alignment);
    common.status = status.get();
    common.timeout_ns = static_cast<u64>(g.timeout * 1e9);
    route_smem = ep_route_smem(shape, num_local_experts());
    memory = g.allocate(common.layout.bytes);
    for (int r = 0; r < g.size; ++r) common.peers[r] = static_cast<u8*>(memory->blocks[r].get());
    if (g.device.type == DeviceType::cuda) {
      const cuda::ContextGuard context(g.device.index);
      dispatch_kernel =
          &load_kernel(g.device.index, jit::ep_dispatch_source(shape.counted), static_cast<int>(kEpMaxSmemBytes));
      combine_kernel =
          &load_kernel(g.device.index, jit::ep_combine_source(ep_sums_are_few(shape)), kEpCombineSmemBytes);
    }
    const EpLayout& l = common.layout;
    for (int i = 0; i < shape.num_buffers; ++i)  // slots, byte for byte of kEpNothing
      ep::fill(memory->blocks[g.rank], g.device, l.buffers + i * l.buffer_stride + l.tokens, l.buffer_stride - l.tokens,
               int(kEpNothing & 0xff));
    g.barrier();  // nobody sends before
  }

  int num_local_experts() const { return ep_num_local_experts(common); }

  std::string where() const { return format_text("rank {} of {}", common.rank, common.shape.num_ranks); }

  /// Throws what kernels, or the CPU's waits, have left.
  void check() {
    check_group();
    std::atomic_ref needed(status->rows_needed);
    if (const int rows = needed.exchange(0))
      throw Error(ErrorCode::capacity_exceeded,
                  format_text("{}: a dispatch had {} rows, but room for {}; the others were not written", where(), rows,
                              status->rows_given));
  }

  /// The same, but no overflow.
  void check_group() {
    group.state()->check();
    const std::atomic_ref state(status->state);
    if (state.load(std::memory_order_acquire) != kEpOk) report_failure();
  }

  [[noreturn]] void report_failure() {
    const EpStatus s = *status;
    const std::string wait = format_text("{}, waiting for {}: peer {}, operation {}, expected {:#x}, seen {:#x}",
                                         where(), awaited(s.phase), s.peer, s.epoch, s.expected, s.seen);
    const char* operation = s.phase == kEpPhaseSums ? "combine" : "dispatch";
    switch (s.state) {
      case kEpTimeout:
        group.state()->fail(ErrorCode::timeout,
                            format_text("{}: it did not come within {:g} s", wait, group.timeout()));
        break;
      case kEpMismatch:
        group.state()->fail(ErrorCode::invalid_argument,
                            format_text("{}: this rank expected {}, rank {} sent {}", wait, format_name(s.expected),
                                        s.peer, format_name(s.seen)));
        break;
      case kEpOtherTokens:
        group.state()->fail(
            ErrorCode::invalid_argument,
            format_text("{}: a {} of {} tokens, expected {}, those of the dispatch that made the handle", where(),
                        operation, s.seen, s.expected));
        break;
      case kEpSendUnderWay:
        group.state()->fail(ErrorCode::invalid_argument,
                            format_text("{}: a {} while {} of its sends had not been received, expected none", where(),
                                        operation, ep_flag_epoch(s.seen - s.expected)));
        break;
      default:
        group.state()->fail(ErrorCode::aborted, format_text("{}: rank {} has aborted the group", wait, s.aborter));
    }
    group.state()->check();
    std::abort();
  }

  EpCommon common_of(const Tensor& handle, EpPart part, int num_tokens) const {
    EpCommon c = common;
    c.handle = static_cast<int*>(handle.data);
    c.send = part != EpPart::recv;
    c.recv = part != EpPart::send;
    c.num_tokens = num_tokens;
    return c;
  }

  template <class Params>
  void run(const Params& params, void (*on_cpu)(const Params&), const cuda::Kernel* on_cuda, int num_warps,
           int smem_bytes, Stream stream) {
    if (group.device().type == DeviceType::cpu) {
      on_cpu(params);
      check();
      return;
    }
    const cuda::ContextGuard context(group.device().index);
    on_cuda->launch({.num_ctas = params.c.shape.num_ctas, .num_threads = 32 * num_warps, .smem_bytes = smem_bytes},
                    &params, stream.handle);
  }

  /// An earlier overflow is told before a routing is sent, never between a routing and its tokens: whoever repeats the
  /// call would send the routing twice.
  void dispatch(const EpDispatch& args, bool copy) {
    args.topk_idx ? check() : check_group();
    check_ep_dispatch(args, config, group.device(), common.handle_layout.words, num_local_experts(), copy);
    const Tensor& tokens = args.topk_idx ? *args.topk_idx : args.x;
    EpDispatchParams p{};
    p.c = common_of(args.handle, args.part, static_cast<int>(tokens.rows()));
    p.smem = route_smem;
    p.route = args.topk_idx.has_value();
    p.copy = copy;
    p.sent = kEpRouting;
    p.alignment = Divisor(config.alignment);
    p.pow2_scales = args.pow2_scales;
    if (p.route) {
      p.topk_idx = args.topk_idx->data;
      p.idx_stride = args.topk_idx->rows() > 1 ? args.topk_idx->strides[0] : 0;
      p.idx_is_64 = args.topk_idx->dtype == DType::int64;
      if (args.topk_weights) {
        p.topk_weights = static_cast<const float*>(args.topk_weights->data);
        p.weights_stride = args.topk_weights->rows() > 1 ? args.topk_weights->strides[0] : 0;
      }
    }
    if (args.offsets) p.offsets = static_cast<int*>(args.offsets->data);
    if (args.counts) p.counts = static_cast<int*>(args.counts->data);
    if (copy) {
      const auto format = [](const Tensor& x) { return x.dtype == DType::e4m3 ? kEpE4m3 : kEpBf16; };
      p.x = args.x.data;
      p.x_stride = row_stride(args.x);
      p.x_format = format(args.x);
      p.format = format(args.rows);
      // With many tokens, scales that are made on the way come otherwise.
      p.sent = p.c.shape.counted && p.x_format != p.format ? kEpQuantized : p.format;
      if (args.x_scales) {
        p.x_scales = static_cast<const float*>(args.x_scales->data);
        p.x_scale_stride_row = args.x_scales->strides[0];
        p.x_scale_stride_col = args.x_scales->strides[1];
      }
      p.rows = args.rows.data;
      p.row_stride = row_stride(args.rows);
      p.capacity = static_cast<int>(args.rows.rows());
      if (args.row_scales) {
        p.row_scales = static_cast<float*>(args.row_scales->data);
        p.row_scale_stride = args.row_scales->strides[1];
      }
      if (args.row_weights) p.row_weights = static_cast<float*>(args.row_weights->data);
    }
    run(p, cpu::ep_dispatch, dispatch_kernel, kEpDispatchWarps, static_cast<int>(4 * route_smem.words), args.stream);
  }

  void combine(const EpCombine& args) {
    check();
    check_ep_combine(args, config, group.device(), common.handle_layout.words);
    EpCombineParams p{};
    p.c = common_of(args.handle, args.part, static_cast<int>(args.out.rows()));
    p.rows = args.rows.data;
    p.row_stride = row_stride(args.rows);
    p.capacity = static_cast<int>(args.rows.rows());
    p.out = args.out.data;
    p.out_stride = row_stride(args.out);
    p.weighted = args.weighted;
    if (args.residual) {
      p.residual = args.residual->data;
      p.residual_stride = row_stride(*args.residual);
    }
    p.values = args.row_values.has_value();
    if (args.row_values) p.row_values = static_cast<const float*>(args.row_values->data);
    if (args.topk_values) p.topk_values = static_cast<float*>(args.topk_values->data);
    run(p, cpu::ep_combine, combine_kernel, kEpCombineWarps, kEpCombineSmemBytes, args.stream);
  }

  int64_t num_rows(const Tensor& handle, Stream stream) {
    check_group();
    check_ep_handle("num_rows", handle, group.device(), common.handle_layout.words);
    const int* word = static_cast<const int*>(handle.data) + common.handle_layout.offsets + num_local_experts();
    int rows = 0;
    if (group.device().type == DeviceType::cpu) {
      rows = *word;
    } else {
      const cuda::ContextGuard context(group.device().index);
      const auto cuda_stream = static_cast<cuda::CUstream>(stream.handle);
      PHALANX_CUDA(cuMemcpyDtoHAsync(&rows, reinterpret_cast<cuda::CUdeviceptr>(word), sizeof rows, cuda_stream));
      PHALANX_CUDA(cuStreamSynchronize(cuda_stream));
    }
    check_group();
    return rows;
  }

  Group group;
  ExpertParallelConfig config;
  EpCommon common{};
  std::shared_ptr<EpStatus> status;
  std::shared_ptr<ep::SymmetricMemory> memory;
  const cuda::Kernel *dispatch_kernel = nullptr, *combine_kernel = nullptr;
  EpRouteSmem route_smem{};
};

ExpertParallel::ExpertParallel(const Group& group, const ExpertParallelConfig& config)
    : impl_(std::make_unique<Impl>(group, config)) {}
ExpertParallel::~ExpertParallel() = default;
ExpertParallel::ExpertParallel(ExpertParallel&&) noexcept = default;
ExpertParallel& ExpertParallel::operator=(ExpertParallel&&) noexcept = default;

const ExpertParallelConfig& ExpertParallel::config() const { return impl_->config; }
const Group& ExpertParallel::group() const { return impl_->group; }
int ExpertParallel::first_local_expert() const { return impl_->common.first_expert[impl_->common.rank]; }
int ExpertParallel::num_local_experts() const { return impl_->num_local_experts(); }
int64_t ExpertParallel::handle_words() const { return impl_->common.handle_layout.words; }

int64_t ExpertParallel::max_rows() const {
  const auto& c = impl_->config;
  const int64_t local = num_local_experts();
  const int64_t choices = int64_t{impl_->group.size()} * c.max_tokens * c.topk;
  // Every expert that has rows may end with padding; choices may name an expert twice.
  return choices + std::min(local, choices) * (c.alignment - 1);
}

void ExpertParallel::route(const EpDispatch& args) { impl_->dispatch(args, false); }
void ExpertParallel::dispatch(const EpDispatch& args) { impl_->dispatch(args, true); }
void ExpertParallel::combine(const EpCombine& args) { impl_->combine(args); }
int64_t ExpertParallel::num_rows(const Tensor& handle, Stream stream) { return impl_->num_rows(handle, stream); }
void ExpertParallel::check() { impl_->check(); }

}  // namespace phalanx
