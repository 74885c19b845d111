#include "jit/file_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <thread>

#include "jit/log.h"
#include "text/text.h"

namespace phalanx::jit {

FileLock::FileLock(std::filesystem::path path, std::chrono::milliseconds patience) : path_(std::move(path)) {
  constexpr std::chrono::milliseconds kPause{5};
  // Polled, since a blocking flock cannot be given a deadline.
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (!(held_ = try_to_lock())) {
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

bool FileLock::try_to_lock() {
  if (descriptor_ < 0) descriptor_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (descriptor_ < 0 || flock(descriptor_, LOCK_EX | LOCK_NB) != 0) return false;
  // A holder removes the file at its end: who had opened it by then has locked what nobody else will find.
  struct stat ours, named;
  if (fstat(descriptor_, &ours) == 0 && stat(path_.c_str(), &named) == 0 && ours.st_dev == named.st_dev &&
      ours.st_ino == named.st_ino)
    return true;
  close(descriptor_);
  descriptor_ = -1;
  errno = EWOULDBLOCK;
  return false;
}

FileLock::~FileLock() {
  if (held_) unlink(path_.c_str());
  if (descriptor_ >= 0) close(descriptor_);
}

}  // namespace phalanx::jit
