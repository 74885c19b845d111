// A lock between processes (and threads) that want to make the same file.
#pragma once

#include <chrono>
#include <filesystem>

namespace phalanx::jit {

/// Holds flock(2) on `path` while it lives, and removes the file at its end. It is a courtesy that saves double or lost
/// work, and no more may rest on it: where it cannot be had (a file system without locks, a holder that hangs), the
/// owner goes on without. The owner publishes its result before the end.
class FileLock {
 public:
  FileLock(std::filesystem::path path, std::chrono::milliseconds patience);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

  bool held() const { return held_; }

 private:
  bool try_to_lock();  // or leaves the reason in errno

  std::filesystem::path path_;
  int descriptor_ = -1;
  bool held_ = false;
};

}  // namespace phalanx::jit
