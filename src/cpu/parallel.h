// Tasks on all cores. Threads live as long as a call: nothing global survives a fork, and callers on different threads
// share no lock.
#pragma once

#include <atomic>
#include <cfenv>
#include <cstdint>
#include <functional>

namespace phalanx::cpu {

/// Rounding to nearest with subnormals, until the end of the scope: a caller may have switched on flush-to-zero, and
/// threads inherit it.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  std::fenv_t saved_;
};

/// PHALANX_NUM_THREADS, else the number of CPUs that this thread may run on.
int max_threads();

/// As many threads as pay for a call of `num_tasks` tasks of `cost` nanoseconds each, roughly: at least 1.
int threads_for(std::int64_t num_tasks, double cost);

/// Hands out the tasks 0 .. num_tasks - 1, each once.
class TaskQueue {
 public:
  explicit TaskQueue(std::int64_t num_tasks) : num_tasks_(num_tasks) {}
  bool next(std::int64_t& task) { return (task = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_; }

 private:
  std::atomic<std::int64_t> next_{0};
  const std::int64_t num_tasks_;
};

/// Calls worker(0) on this thread and worker(1 .. num_threads - 1) on others, and waits for all. The worker takes its
/// tasks from a queue and must not throw: where the system refuses a thread, the others do its share. All run in the
/// default floating-point environment, whatever the caller's.
void run_on_threads(int num_threads, const std::function<void(int thread_idx)>& worker);

}  // namespace phalanx::cpu
