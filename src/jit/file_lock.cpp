#include "jit/file_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <thread>

#include "jit/log.h"
#include "text/text.h"

namespace phalanx::jit {

FileLock::FileLock(std::filesystem::path path, std::chrono::milliseconds patience) : path_(std::move(path)) {
  constexpr std::chrono::milliseconds kPause{5};
  descriptor_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor_ < 0) {
    log_debug(format_text("no lock {}: {}", path_.string(), std::strerror(errno)));
    return;
  }
  // Polled, since a blocking flock cannot be given a deadline.
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (!(held_ = flock(descriptor_, LOCK_EX | LOCK_NB) == 0)) {
    if (errno != EWOULDBLOCK && errno != EINTR) {
      log_debug(format_text("no lock {}: {}", path_.string(), std::strerror(errno)));
      return;
    }
    if (std::chrono::steady_clock::now() >= deadline) {
      log_info(format_text("{} has been locked for {} ms; going on without it", path_.string(), patience.count()));
      return;
    }
    std::this_thread::sleep_for(kPause);
  }
}

FileLock::~FileLock() {
  if (held_) unlink(path_.c_str());
  if (descriptor_ >= 0) close(descriptor_);
}

}  // namespace phalanx::jit
