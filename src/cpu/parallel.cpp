#include "cpu/parallel.h"

#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <system_error>
#include <thread>
#include <vector>

namespace phalanx::cpu {
namespace {

// Starting and joining a thread costs some 20 us; below this much work it is not worth it.
constexpr double kMinWorkPerThread = 100e3;  // ns

}  // namespace

int max_threads() {
  if (const char* text = std::getenv("PHALANX_NUM_THREADS")) {
    if (const int count = std::atoi(text); count > 0) return count;
  }
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof cpus, &cpus) == 0) return std::max(1, CPU_COUNT(&cpus));
  return std::max(1u, std::thread::hardware_concurrency());
}

int threads_for(std::int64_t num_tasks, double cost) {
  const double useful = std::clamp(static_cast<double>(num_tasks) * cost / kMinWorkPerThread, 1.0, 1e6);
  return static_cast<int>(
      std::min<std::int64_t>({max_threads(), static_cast<std::int64_t>(useful), std::max<std::int64_t>(num_tasks, 1)}));
}

void run_on_threads(int num_threads, const std::function<void(int)>& worker) {
  const DefaultFloatEnvironment environment;
  std::vector<std::jthread> helpers;
  helpers.reserve(num_threads - 1);
  try {
    for (int i = 1; i < num_threads; ++i) helpers.emplace_back(worker, i);
  } catch (const std::system_error&) {
  }
  worker(0);
}

}  // namespace phalanx::cpu
