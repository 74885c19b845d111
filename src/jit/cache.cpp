// get_cubin: memory, packs, disk, compiler.
#include <atomic>
#include <map>
#include <mutex>
#include <shared_mutex>

#include "jit/compile.h"
#include "jit/entry.h"
#include "jit/file_lock.h"
#include "jit/log.h"
#include "jit/nvrtc.h"
#include "text/text.h"

namespace phalanx::jit {
namespace {

namespace fs = std::filesystem;

// Longer than the slowest compile on a busy machine, shorter than a user's patience with a holder that hangs.
constexpr std::chrono::seconds kLockPatience{60};

// What this process has found or compiled. A cubin belongs to no device, so that all of them share it.
class Memory {
 public:
  // A kernel's place. Whoever holds its mutex may look for the cubin, so that threads compile it once.
  struct Slot {
    std::mutex mutex;
    std::shared_ptr<const Cubin> cubin;
  };

  std::shared_ptr<Slot> slot(const std::string& id) {
    {
      const std::shared_lock lock(mutex_);
      if (const auto found = slots_.find(id); found != slots_.end()) return found->second;
    }
    const std::unique_lock lock(mutex_);
    auto& slot = slots_[id];
    if (!slot) slot = std::make_shared<Slot>();
    return slot;
  }

 private:
  std::shared_mutex mutex_;
  std::map<std::string, std::shared_ptr<Slot>> slots_;
};

Memory& memory() {
  static auto& instance = *new Memory;
  return instance;
}

// A cache that does not work costs time, which is worth one line and no more.
void warn_once(const std::string& reason) {
  static std::atomic_flag warned;
  if (warned.test_and_set()) return;
  log_warning(
      format_text("kernels cannot be kept on disk, so every process compiles them anew: {}. "
                  "Set PHALANX_CACHE_DIR to a writable directory.",
                  reason));
}

std::optional<Cubin> found(std::optional<Cubin> cubin, Origin origin) {
  if (cubin) cubin->origin = origin;
  return cubin;
}

std::optional<Cubin> search_packs(const EntryKey& key) {
  for (const fs::path& directory : pack_dirs()) {
    if (auto cubin = read_entry(directory, key)) return found(std::move(cubin), Origin::pack);
  }
  return std::nullopt;
}

Cubin compile_and_keep(const KernelSource& source, const std::string& arch, const EntryKey& key,
                       const fs::path& directory) {
  Cubin cubin = compile(source, arch);
  log_info(format_text("compiled {} in {:.2f} s", source.name, cubin.info.seconds));
  if (directory.empty()) {
    warn_once("none of PHALANX_CACHE_DIR, XDG_CACHE_HOME and HOME is set");
    return cubin;
  }
  try {
    write_entry(directory, key, cubin);
  } catch (const std::system_error& error) {
    warn_once(error.what());
  }
  return cubin;
}

Cubin find_or_compile(const KernelSource& source, const std::string& arch, const EntryKey& key) {
  if (auto cubin = search_packs(key)) return *std::move(cubin);
  const fs::path directory = cache_dir();
  if (auto cubin = found(read_entry(directory, key), Origin::disk)) return *std::move(cubin);
  require_nvrtc();
  if (directory.empty()) return compile_and_keep(source, arch, key, directory);

  std::error_code ignored;  // write_entry meets the same obstacle, and says so
  fs::create_directories(directory, ignored);
  const FileLock lock(directory / (file_name(key) + ".lock"), kLockPatience);
  // Whoever held the lock before us has published it.
  if (auto cubin = found(read_entry(directory, key), Origin::disk)) return *std::move(cubin);
  return compile_and_keep(source, arch, key, directory);
}

}  // namespace

std::shared_ptr<const Cubin> get_cubin(const KernelSource& source, const std::string& arch) {
  const NvrtcInfo& compiler = nvrtc().info;
  const std::string version = compiler.available ? format_text("{}.{}", compiler.major, compiler.minor) : "";
  const EntryKey key = entry_key(source, arch, version);
  const auto slot = memory().slot(file_name(key));
  const std::lock_guard lock(slot->mutex);
  if (slot->cubin) return slot->cubin;

  auto cubin = std::make_shared<Cubin>(find_or_compile(source, arch, key));
  auto kept = std::make_shared<Cubin>(*cubin);
  kept->origin = Origin::memory;
  slot->cubin = std::move(kept);
  return cubin;
}

void publish(const fs::path& dir, const KernelSource& source, const std::string& arch, const Cubin& cubin) {
  write_entry(dir, entry_key(source, arch, cubin.info.nvrtc), cubin);
}

}  // namespace phalanx::jit
