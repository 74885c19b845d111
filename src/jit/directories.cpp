// Where entries live.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "jit/entry.h"
#include "jit/jit.h"
#include "text/text.h"

namespace phalanx::jit {
namespace {

namespace fs = std::filesystem;

fs::path path_in(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr ? value : "";
}

// The shared library's folder, or the program's where the objects are linked into one.
fs::path library_dir() {
  Dl_info info{};
  if (dladdr(reinterpret_cast<const void*>(&cache_dir), &info) == 0 || info.dli_fname == nullptr) return {};
  std::error_code error;
  return fs::weakly_canonical(info.dli_fname, error).parent_path();
}

// Calls `visit(path, key)` for each of our files in the cache directory.
template <class Visit>
void for_each_file(Visit&& visit) {
  std::error_code error;
  for (fs::directory_iterator file(cache_dir(), error), end; !error && file != end; file.increment(error)) {
    if (const auto key = parse_file_name(file->path().filename().string())) visit(file->path(), *key);
  }
}

}  // namespace

fs::path cache_dir() {
  if (const fs::path own = path_in("PHALANX_CACHE_DIR"); !own.empty()) return own;
  // The XDG base directory specification says to ignore a relative path.
  if (const fs::path xdg = path_in("XDG_CACHE_HOME"); xdg.is_absolute()) return xdg / "phalanx";
  if (const fs::path home = path_in("HOME"); !home.empty()) return home / ".cache" / "phalanx";
  return {};
}

fs::path tuned_path() {
  if (const fs::path own = path_in("PHALANX_TUNED"); !own.empty()) return own;
  const fs::path cache = cache_dir();
  return cache.empty() ? cache : cache / "tuned.json";
}

std::vector<fs::path> pack_dirs() {
  std::vector<fs::path> directories;
  const std::string list = path_in("PHALANX_PACK_PATH").string();
  for (std::string_view rest = list; !rest.empty();) {
    const std::size_t colon = std::min(rest.find(':'), rest.size());
    if (colon > 0) directories.emplace_back(rest.substr(0, colon));
    rest.remove_prefix(std::min(colon + 1, rest.size()));
  }
  if (const fs::path beside = library_dir(); !beside.empty()) directories.push_back(beside / "packs");
  return directories;
}

std::vector<CacheEntry> cache_entries() {
  std::vector<CacheEntry> entries;
  for_each_file([&](const fs::path& path, const EntryKey& key) {
    std::error_code error;
    const std::uintmax_t bytes = fs::file_size(path, error);
    if (!error && path.filename() == file_name(key)) entries.push_back({path, key.name, bytes});
  });
  std::sort(entries.begin(), entries.end(), [](const auto& x, const auto& y) { return x.path < y.path; });
  return entries;
}

Cleared clear_cache() {
  // Listed first, deleted after: a directory that changes under its iterator may show a file twice or not at all.
  std::vector<std::pair<fs::path, bool>> files;
  for_each_file(
      [&](const fs::path& path, const EntryKey& key) { files.emplace_back(path, path.filename() == file_name(key)); });
  Cleared cleared;
  for (const auto& [path, is_entry] : files) {
    std::error_code error;
    const bool removed = fs::remove(path, error);
    if (error && cleared.num_left++ == 0) cleared.error = format_text("{}: {}", path.string(), error.message());
    if (removed && is_entry) ++cleared.num_kernels;
  }
  return cleared;
}

}  // namespace phalanx::jit
