// Measures every kernel on shapes of one's own and keeps the choices, which then go before the planner's.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iterator>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/operands.h"
#include "cli/threads.h"
#include "cuda/cuda.h"
#include "jit/file_lock.h"
#include "jit/kernels.h"
#include "plan/tuned.h"
#include "text/text.h"

namespace phalanx::cli {
namespace {

constexpr double kWorthwhile = 0.99;  // a choice that is not 1 % faster than the planner's is not kept: that is noise
constexpr double kHopeless = 1.5;     // times the best, after the first rounds
constexpr int kFirstRounds = 3;
constexpr std::chrono::seconds kLockPatience{10};

// Puts the choice into the file, or takes out the one that was there, and returns how many there are then. Other
// processes may be tuning, so their choices are read again; and they may be reading, so the file is replaced as a
// whole.
std::size_t update_tuned(const std::filesystem::path& path, const plan::TunedGemm& choice, bool keep) {
  std::filesystem::create_directories(std::filesystem::absolute(path).parent_path());
  const jit::FileLock lock(path.string() + ".lock", kLockPatience);
  auto tuned = read_tuned(path);
  if (keep)
    tuned.put(choice);
  else
    tuned.erase(choice.gpu, choice.problem, choice.num_sms);
  const std::filesystem::path partial = format_text("{}.{}.partial", path.string(), getpid());
  write_file(partial, tuned.to_json());
  std::filesystem::rename(partial, path);
  return tuned.entries().size();
}

struct Candidate {
  plan::GemmPlan plan;
  std::vector<double> seconds;

  double median_us() const { return median(seconds) * 1e6; }
};

void compile_all(const std::vector<Candidate>& candidates, const std::string& arch) {
  for_each_on_threads(0, candidates.size(),
                      [&](std::size_t i) { jit::get_cubin(jit::gemm_source(candidates[i].plan.config), arch); });
}

// Every candidate in turn, round after round, so that a clock that falls falls on all.
void measure(Machine& machine, const Operands& operands, const GemmOptions& options, int rounds,
             std::vector<Candidate>& candidates) {
  for (int round = -1; round < rounds; ++round) {  // the first loads the kernels
    for (Candidate& candidate : candidates) {
      setenv("PHALANX_GEMM_CONFIG", plan::format_plan(candidate.plan).c_str(), 1);
      const double seconds = machine.time([&] { operands.multiply(options); });
      if (round >= 0) candidate.seconds.push_back(seconds);
    }
    if (round + 1 != kFirstRounds) continue;
    const auto faster = [](const Candidate& x, const Candidate& y) { return x.median_us() < y.median_us(); };
    const double best = std::min_element(candidates.begin(), candidates.end(), faster)->median_us();
    // The first is the planner's choice, and stays for the comparison.
    const auto hopeless = [&](const Candidate& candidate) { return candidate.median_us() > kHopeless * best; };
    candidates.erase(std::remove_if(candidates.begin() + 1, candidates.end(), hopeless), candidates.end());
  }
}

// The planner's choice first, then every other kernel that can do the product.
std::vector<Candidate> candidates_for(const plan::GemmProblem& problem, int num_sms) {
  std::vector<Candidate> candidates{{plan::plan_gemm(problem, num_sms), {}}};
  for (const plan::GemmPlan& plan : plan::runnable_plans(problem, num_sms))
    if (!(plan == candidates.front().plan)) candidates.push_back({plan, {}});
  return candidates;
}

}  // namespace

plan::TunedGemms read_tuned(const std::filesystem::path& path) {
  std::ifstream file(path);
  if (!file) return {};
  try {
    return plan::TunedGemms::from_json(std::string(std::istreambuf_iterator<char>(file), {}));
  } catch (const std::exception& error) {
    throw Error(ErrorCode::invalid_argument,
                format_text("{}: not what phalanx tune writes ({}); move it away first", path.string(), error.what()));
  }
}

int tune(const TuneOptions& options) {
  const auto path = jit::tuned_path();
  if (path.empty()) throw Error(ErrorCode::invalid_argument, "no place for the choices: set PHALANX_TUNED or HOME");
  std::vector<Shape> shapes;
  for (const std::string& text : options.shapes) shapes.push_back(parse_shape(text, "tune"));
  std::size_t num_choices = read_tuned(path).entries().size();  // a file that is not ours is told before the work

  // Before the first product: then the library reads the variable at each.
  setenv("PHALANX_GEMM_CONFIG", "", 1);
  const auto machine = open_machine(options.device);
  if (machine->device().type != DeviceType::cuda)
    throw Error(ErrorCode::unsupported, "tune: there is no Hopper GPU here to measure on");
  const cuda::DeviceInfo& gpu = cuda::device(machine->device().index);
  const int num_sms = options.num_sms > 0 ? std::min(options.num_sms, gpu.num_sms) : gpu.num_sms;
  const bool is_f32 = options.out_dtype == "f32";
  GemmOptions gemm;
  gemm.stream = machine->stream();
  gemm.num_sms = num_sms;

  print_text("gemm_fp8 to {} on {}, {} SMs, cold L2, median of {}\n", options.out_dtype, machine->name(), num_sms,
             options.rounds);
  print_text("{:>7} {:>7} {:>7} {:>11} {:>9} {:>7}  {}\n", "M", "N", "K", "planner us", "best us", "gain", "kernel");
  for (const auto& [m, n, k] : shapes) {
    const plan::GemmProblem problem{
        .m = m, .n = n, .k = k, .out = is_f32 ? OutType::f32 : OutType::bf16, .all_sms = num_sms == gpu.num_sms};
    auto candidates = candidates_for(problem, num_sms);
    compile_all(candidates, gpu.arch());
    setenv("PHALANX_GEMM_CONFIG", "", 1);
    const auto operands = make_operands(*machine, {m, n, k}, is_f32 ? DType::f32 : DType::bf16);
    measure(*machine, operands, gemm, options.rounds, candidates);

    const double planner_us = candidates.front().median_us();
    const auto best = std::min_element(candidates.begin(), candidates.end(),
                                       [](const auto& x, const auto& y) { return x.median_us() < y.median_us(); });
    const bool keep = best->median_us() < kWorthwhile * planner_us;
    num_choices = update_tuned(
        path, {gpu.name, problem, num_sms, plan::format_plan(best->plan), best->median_us(), planner_us}, keep);
    print_text("{:>7} {:>7} {:>7} {:>11.2f} {:>9.2f} {:>6.1f}%  {}\n", m, n, k, planner_us, best->median_us(),
               100 * (planner_us / best->median_us() - 1),
               keep ? jit::gemm_source(best->plan.config).name : "the planner's");
    std::fflush(stdout);
  }
  print_text("{} choices in {}\n", num_choices, path.string());
  return 0;
}

}  // namespace phalanx::cli
