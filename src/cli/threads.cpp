#include "cli/threads.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace phalanx::cli {

void for_each_on_threads(int num_threads, std::size_t count, const std::function<void(std::size_t)>& work) {
  std::atomic<std::size_t> next = 0;
  std::exception_ptr error;
  std::once_flag failed;
  const auto worker = [&] {
    try {
      for (std::size_t i = next++; i < count; i = next++) work(i);
    } catch (...) {
      next = count;
      std::call_once(failed, [&] { error = std::current_exception(); });
    }
  };
  if (num_threads == 0) num_threads = static_cast<int>(std::thread::hardware_concurrency());
  std::vector<std::jthread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back(worker);
  worker();
  threads.clear();  // joins
  if (error) std::rethrow_exception(error);
}

}  // namespace phalanx::cli
