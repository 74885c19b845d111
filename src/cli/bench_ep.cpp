// `phalanx bench ep`: ranks are threads of this process, one a GPU, or on the CPU.
#include <algorithm>
#include <cstdio>
#include <exception>
#include <random>
#include <thread>
#include <vector>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/machine.h"
#include "cuda/cuda.h"
#include "phalanx/phalanx.h"
#include "text/text.h"

namespace phalanx::cli {
namespace {

std::vector<Device> devices_of(const BenchEpOptions& options) {
  std::vector<Device> devices;
  if (options.device != "cpu") {
    for (const auto& gpu : cuda::devices())
      if (gpu.is_hopper()) devices.push_back({DeviceType::cuda, gpu.ordinal});
  }
  if (options.device == "cuda" && devices.empty())
    throw Error(ErrorCode::invalid_device, "--device: cuda; there is no GPU that our kernels run on");
  const bool on_cpu = devices.empty();
  const int ranks = options.ranks > 0 ? options.ranks : on_cpu ? 2 : static_cast<int>(devices.size());
  if (!on_cpu && ranks > static_cast<int>(devices.size()))
    throw Error(ErrorCode::invalid_argument, format_text("--ranks: {}; there are {} GPUs", ranks, devices.size()));
  devices.resize(ranks);
  return devices;
}

/// What one rank sends, receives and measures.
class Rank {
 public:
  Rank(const Group& group, const ExpertParallelConfig& config, const BenchEpOptions& options)
      : group_(group),
        options_(options),
        machine_(open_machine(group.device().type == DeviceType::cpu ? "cpu"
                                                                     : format_text("cuda:{}", group.device().index))),
        ep_(group, config) {
    const std::int64_t tokens = options.tokens, hidden = options.hidden, blocks = (hidden + 127) / 128;
    std::mt19937 rng(1 + group.rank());
    std::vector<std::int32_t> topk;
    for (std::int64_t t = 0; t < tokens; ++t) choose_experts(topk, rng);
    std::vector<std::uint16_t> x(tokens * hidden);  // BF16 of about 1, either sign
    for (auto& value : x) value = static_cast<std::uint16_t>(0x3f80 ^ (rng() & 0x807f));

    dispatch_.x = upload(x, DType::bf16, hidden);
    dispatch_.topk_idx = upload(topk, DType::int32, options.topk);
    dispatch_.handle = vector(DType::int32, ep_.handle_words());
    ep_.route(dispatch_);
    capacity_ = ep_.num_rows(dispatch_.handle);
    rows_bf16_ = matrix(DType::bf16, capacity_, hidden);
    rows_e4m3_ = matrix(DType::e4m3, capacity_, hidden);
    const Tensor columns = matrix(DType::f32, blocks, capacity_);
    scales_ = {columns.data, DType::f32, columns.device, 2, {capacity_, blocks}, {1, capacity_}};
    dispatch_.rows = rows_bf16_;
    combine_.rows = rows_bf16_;
    combine_.handle = dispatch_.handle;
    combine_.out = matrix(DType::bf16, tokens, hidden);
  }

  std::string name() const { return machine_->name(); }

  /// Seconds of each repeat. A rank that comes early waits, so that the shortest time of all ranks is the operation's.
  std::vector<double> time(const std::function<void()>& work) {
    std::vector<double> seconds;
    for (int i = 0; i < options_.repeats + 1; ++i) {
      group_.barrier();
      seconds.push_back(machine_->time(work));
    }
    ep_.check();
    return {seconds.begin() + 1, seconds.end()};
  }

  std::vector<double> dispatch_bf16() {
    dispatch_.rows = rows_bf16_;
    dispatch_.row_scales.reset();
    return time([&] { ep_.dispatch(dispatch_); });
  }
  std::vector<double> dispatch_as_e4m3() {
    dispatch_.rows = rows_e4m3_;
    dispatch_.row_scales = scales_;
    return time([&] { ep_.dispatch(dispatch_); });
  }
  std::vector<double> combine() {
    return time([&] { ep_.combine(combine_); });
  }

 private:
  void choose_experts(std::vector<std::int32_t>& topk, std::mt19937& rng) const {
    const std::size_t begin = topk.size();
    while (topk.size() < begin + options_.topk) {
      const auto expert = static_cast<std::int32_t>(rng() % options_.experts);
      if (std::find(topk.begin() + begin, topk.end(), expert) == topk.end()) topk.push_back(expert);
    }
  }

  Tensor matrix(DType dtype, std::int64_t rows, std::int64_t cols) {
    memory_.push_back(machine_->allocate(std::max<std::size_t>(1, rows * cols * size_of(dtype))));
    return row_major(memory_.back().get(), dtype, rows, cols, group_.device());
  }
  Tensor vector(DType dtype, std::int64_t length) {
    return {matrix(dtype, 1, length).data, dtype, group_.device(), 1, {length}, {1}};
  }
  template <class T>
  Tensor upload(const std::vector<T>& values, DType dtype, std::int64_t cols) {
    const Tensor on_device = matrix(dtype, std::ssize(values) / cols, cols);
    machine_->upload(on_device.data, values.data(), values.size() * sizeof(T));
    return on_device;
  }

  Group group_;
  const BenchEpOptions& options_;
  std::unique_ptr<Machine> machine_;
  ExpertParallel ep_;
  std::vector<std::shared_ptr<void>> memory_;
  std::int64_t capacity_ = 0;
  Tensor rows_bf16_, rows_e4m3_, scales_;
  EpDispatch dispatch_;
  EpCombine combine_;
};

/// The median over repeats of the shortest time of any rank.
double seconds_of(const std::vector<std::vector<double>>& ranks) {
  std::vector<double> shortest = ranks[0];
  for (const auto& times : ranks)
    for (std::size_t i = 0; i < times.size(); ++i) shortest[i] = std::min(shortest[i], times[i]);
  return median(shortest);
}

}  // namespace

int bench_ep(const BenchEpOptions& given) {
  BenchEpOptions options = given;
  const std::vector<Device> devices = devices_of(options);
  if (options.tokens == 0) options.tokens = devices[0].type == DeviceType::cpu ? 32 : options.latency ? 128 : 4096;
  const ExpertParallelConfig config{.hidden = options.hidden,
                                    .num_experts = options.experts,
                                    .topk = options.topk,
                                    .max_tokens = options.tokens,
                                    .dtype = DType::bf16,
                                    .latency = options.latency,
                                    .num_sms = options.num_sms};
  if (options.topk > options.experts)
    throw Error(ErrorCode::invalid_argument, format_text("--topk: {}; expected at most --experts", options.topk));
  auto groups = Group::local(devices);
  const std::size_t n = groups.size();
  struct Operation {
    const char* name;
    std::vector<double> (Rank::*run)();
    double token_bytes;
  };
  const double bf16 = 2.0 * options.hidden, e4m3 = options.hidden + 4.0 * ((options.hidden + 127) / 128);
  const Operation operations[] = {{"dispatch bf16", &Rank::dispatch_bf16, bf16},
                                  {"dispatch bf16 as e4m3", &Rank::dispatch_as_e4m3, e4m3},
                                  {"combine bf16", &Rank::combine, bf16}};
  std::vector<std::vector<std::vector<double>>> seconds(std::size(operations), std::vector<std::vector<double>>(n));
  std::vector<std::exception_ptr> errors(n);
  std::string name;
  {
    std::vector<std::jthread> threads;
    for (std::size_t r = 0; r < n; ++r) {
      threads.emplace_back([&, r] {
        try {
          Rank rank(groups[r], config, options);
          if (r == 0) name = rank.name();
          for (std::size_t i = 0; i < std::size(operations); ++i) seconds[i][r] = (rank.*operations[i].run)();
          groups[r].barrier();  // nobody frees what another still waits for
        } catch (...) {
          errors[r] = std::current_exception();
          groups[r].abort();
        }
      });
    }
  }
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);

  std::FILE* table = options.json == "-" ? stderr : stdout;
  print_text(table, "expert parallelism, {} ranks ({}), {} tokens, hidden {}, top-{} of {}, median of {}\n", n, name,
             options.tokens, options.hidden, options.topk, options.experts, options.repeats);
  print_text(table, "{:<24} {:>12} {:>14}\n", "", "us", "GB/s of rows");
  Json rows = Json::array();
  for (std::size_t i = 0; i < std::size(operations); ++i) {
    const double time = seconds_of(seconds[i]);
    const double gbps = double(options.tokens) * options.topk * operations[i].token_bytes / time * 1e-9;
    print_text(table, "{:<24} {:>12.1f} {:>14.1f}\n", operations[i].name, time * 1e6, gbps);
    rows.push_back({{"op", operations[i].name}, {"median_us", time * 1e6}, {"gbps", gbps}});
  }
  if (!options.json.empty()) write_json(options.json, {{"device", name}, {"ranks", n}, {"rows", rows}});
  return 0;
}

}  // namespace phalanx::cli
