// Work that a command spreads over threads.
#pragma once

#include <cstddef>
#include <functional>

namespace phalanx::cli {

/// Calls `work` with 0 to `count` - 1, each once, from so many threads; 0 means one per core. Once a call has thrown,
/// no other begins, and the first exception is thrown here when all threads have ended.
void for_each_on_threads(int num_threads, std::size_t count, const std::function<void(std::size_t)>& work);

}  // namespace phalanx::cli
