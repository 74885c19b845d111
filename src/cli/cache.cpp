#include "cli/commands.h"
#include "cli/format.h"
#include "jit/jit.h"
#include "text/text.h"

namespace phalanx::cli {

int cache_show(bool json) {
  const auto directory = jit::cache_dir();
  const auto entries = jit::cache_entries();
  std::uintmax_t bytes = 0;
  for (const auto& entry : entries) bytes += entry.bytes;

  if (json) {
    Json list = Json::array();
    for (const auto& entry : entries) {
      list.push_back({{"kernel", entry.kernel}, {"bytes", entry.bytes}, {"path", entry.path.string()}});
    }
    write_json("-", {{"directory", directory.string()}, {"bytes", bytes}, {"entries", list}});
    return 0;
  }
  for (const auto& entry : entries) print_text("{:>10}  {}\n", human_bytes(entry.bytes), entry.kernel);
  print_text("{} kernels, {} in {}\n", entries.size(), human_bytes(bytes),
             directory.empty() ? "no directory (set PHALANX_CACHE_DIR or HOME)" : directory.string());
  return 0;
}

int cache_clear() {
  const auto [num_kernels, num_left, error] = jit::clear_cache();
  print_text("Deleted {} kernels from {}\n", num_kernels, jit::cache_dir().string());
  if (num_left == 0) return 0;
  print_text("{} files could not be deleted, the first one {}\n", num_left, error);
  return 1;
}

}  // namespace phalanx::cli
