#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/threads.h"
#include "jit/jit.h"
#include "jit/kernels.h"
#include "text/text.h"

namespace phalanx::cli {
namespace {

struct Outcome {
  jit::CompileInfo info;
  jit::Origin origin = jit::Origin::compiled;
  std::string error;

  // A stack frame is a register array that fell into local memory, which no spill reports.
  bool good() const { return error.empty() && info.spill_bytes == 0 && info.stack_bytes == 0 && info.warnings.empty(); }
};

const char* name_of(jit::Origin origin) {
  switch (origin) {
    case jit::Origin::memory:
      return "memory";
    case jit::Origin::pack:
      return "pack";
    case jit::Origin::disk:
      return "disk";
    case jit::Origin::compiled:
      return "compiled";
  }
  return "";
}

// One bar that is redrawn on a terminal; one line per kernel anywhere else, where a bar would fill a log with itself.
class Progress {
 public:
  explicit Progress(int total) : total_(total) {}

  void report(const std::string& kernel, const Outcome& outcome) {
    const std::lock_guard lock(mutex_);
    ++done_;
    if (terminal_) {
      constexpr int kWidth = 32;
      const int filled = kWidth * done_ / total_;
      print_text(stderr, "\r\033[K[{:#<{}}{:.<{}}] {}/{} {}", "", filled, "", kWidth - filled, done_, total_, kernel);
      if (done_ == total_) print_text(stderr, "\r\033[K");
    } else {
      print_text(stderr, "[{:>3}/{}] {:<44} {:>8} {:6.2f} s {:4} registers{}\n", done_, total_, kernel,
                 name_of(outcome.origin), outcome.info.seconds, outcome.info.registers, outcome.good() ? "" : "  BAD");
    }
    std::fflush(stderr);
  }

 private:
  const bool terminal_ = isatty(STDERR_FILENO) != 0;
  const int total_;
  int done_ = 0;
  std::mutex mutex_;
};

Outcome build(const jit::KernelSource& kernel, const WarmupOptions& options) {
  Outcome outcome;
  try {
    const auto cubin = options.fresh ? std::make_shared<const jit::Cubin>(jit::compile(kernel, options.arch))
                                     : jit::get_cubin(kernel, options.arch);
    outcome.info = cubin->info;
    outcome.origin = cubin->origin;
    if (!options.out.empty()) jit::publish(options.out, kernel, options.arch, *cubin);
  } catch (const std::exception& error) {
    outcome.error = error.what();
  }
  return outcome;
}

std::vector<Outcome> build_all(const std::vector<jit::KernelSource>& kernels, const WarmupOptions& options) {
  std::vector<Outcome> outcomes(kernels.size());
  Progress progress(static_cast<int>(kernels.size()));
  for_each_on_threads(options.jobs, kernels.size(), [&](std::size_t i) {
    outcomes[i] = build(kernels[i], options);
    progress.report(kernels[i].name, outcomes[i]);
  });
  return outcomes;
}

Json to_json(const std::vector<jit::KernelSource>& kernels, const std::vector<Outcome>& outcomes,
             const WarmupOptions& options, double wall_seconds) {
  Json rows = Json::array();
  for (std::size_t i = 0; i < kernels.size(); ++i) {
    const auto& [info, origin, error] = outcomes[i];
    rows.push_back({{"name", kernels[i].name},
                    {"origin", name_of(origin)},
                    {"seconds", info.seconds},
                    {"registers", info.registers},
                    {"spill_bytes", info.spill_bytes},
                    {"stack_bytes", info.stack_bytes},
                    {"static_smem_bytes", info.static_smem_bytes},
                    {"warnings", info.warnings},
                    {"error", error}});
  }
  const auto nvrtc = jit::nvrtc_info();
  return {{"arch", options.arch},
          {"nvrtc", format_text("{}.{}", nvrtc.major, nvrtc.minor)},
          {"wall_seconds", wall_seconds},
          {"kernels", rows}};
}

std::string fault_of(const Outcome& outcome) {
  if (!outcome.error.empty()) return outcome.error;
  std::string fault;
  if (outcome.info.spill_bytes > 0) fault += format_text("spills {} bytes; ", outcome.info.spill_bytes);
  if (outcome.info.stack_bytes > 0) fault += format_text("has a stack of {} bytes; ", outcome.info.stack_bytes);
  return fault + format_text("{}", fmt::join(outcome.info.warnings, "; "));
}

// Says what is wrong with the bad kernels, each fault once; returns how many are bad.
int print_faults(const std::vector<jit::KernelSource>& kernels, const std::vector<Outcome>& outcomes) {
  std::map<std::string, std::vector<std::string>> names_by_fault;
  int num_bad = 0;
  for (std::size_t i = 0; i < kernels.size(); ++i) {
    if (outcomes[i].good()) continue;
    ++num_bad;
    names_by_fault[fault_of(outcomes[i])].push_back(kernels[i].name);
  }
  for (const auto& [fault, names] : names_by_fault) print_text(stderr, "{}: {}\n", fmt::join(names, ", "), fault);
  return num_bad;
}

}  // namespace

int warmup(const WarmupOptions& options) {
  if (!options.out.empty()) std::filesystem::create_directories(options.out);
  if (!options.json.empty() && options.json != "-") write_json(options.json, Json::object());  // fails before the work

  const auto kernels = jit::all_kernels();
  const auto start = std::chrono::steady_clock::now();
  const auto outcomes = build_all(kernels, options);
  const double wall_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  const int num_bad = print_faults(kernels, outcomes);
  std::vector<double> seconds;
  for (const auto& outcome : outcomes) {
    if (outcome.origin == jit::Origin::compiled && outcome.error.empty()) seconds.push_back(outcome.info.seconds);
  }
  print_text(stderr, "{} kernels for {} in {:.1f} s: {} compiled", kernels.size(), options.arch, wall_seconds,
             seconds.size());
  if (!seconds.empty()) {
    print_text(stderr, " (median {:.2f} s, slowest {:.2f} s)", median(seconds),
               *std::max_element(seconds.begin(), seconds.end()));
  }
  print_text(stderr, ", {} bad{}\n", num_bad,
             options.out.empty() ? "" : format_text("; pack in {}", options.out.string()));
  if (!options.json.empty()) write_json(options.json, to_json(kernels, outcomes, options, wall_seconds));
  return num_bad == 0 ? 0 : 1;
}

}  // namespace phalanx::cli
