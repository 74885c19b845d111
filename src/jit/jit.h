// From a kernel's source text to its cubin: memory of this process's compiles, packs, disk cache, and only then NVRTC.
// Sees no tensor and launches nothing; works on a machine without a GPU.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace phalanx::jit {

/// One translation unit: an include of a device header, one constexpr config, one extern "C" kernel named
/// `kEntryPoint`.
struct KernelSource {
  std::string name;  ///< unique and readable, also the file name of its cubin: "gemm_fp8_256x128_c2_s1_st3_w2_bf16"
  std::string text;
};

inline constexpr const char* kEntryPoint = "phalanx_kernel";

/// What ptxas said of a kernel.
struct CompileInfo {
  std::string nvrtc;  ///< the compiler's version: "13.0"
  double seconds = 0;
  int registers = 0, spill_bytes = 0, stack_bytes = 0, static_smem_bytes = 0;
  std::vector<std::string>
      warnings;  ///< ptxas advisories such as C7510 (serialised wgmma); must be empty for our kernels
};

enum class Origin { memory, pack, disk, compiled };

struct Cubin {
  std::string bytes;
  CompileInfo info;
  Origin origin = Origin::compiled;
};

/// The cubin for `arch` ("sm_90a"). Thread-safe; processes that want the same kernel at once compile it once.
/// Packs and the disk cache serve a machine without NVRTC too, whichever version made their entries.
/// @throws Error unsupported (no NVRTC), compilation_failed (the message holds NVRTC's log)
std::shared_ptr<const Cubin> get_cubin(const KernelSource& source, const std::string& arch);

/// Compiles with NVRTC, past every cache.
/// @throws Error as get_cubin
Cubin compile(const KernelSource& source, const std::string& arch);

// --- where things are ------------------------------------------------------------------------------------------------

struct NvrtcInfo {
  bool available = false;
  int major = 0, minor = 0;
  std::string path;   ///< of the library that was loaded
  std::string error;  ///< why not, when unavailable
};
NvrtcInfo nvrtc_info();

/// PHALANX_CACHE_DIR, else $XDG_CACHE_HOME/phalanx, else $HOME/.cache/phalanx; empty when none is set.
std::filesystem::path cache_dir();
/// Where `phalanx tune` keeps its choices: PHALANX_TUNED, else tuned.json in the cache directory; empty without one.
std::filesystem::path tuned_path();
/// PHALANX_PACK_PATH, colon-separated, read-only; then `packs/` beside the library.
std::vector<std::filesystem::path> pack_dirs();

struct CacheEntry {
  std::filesystem::path path;
  std::string kernel;
  std::uintmax_t bytes = 0;
};
std::vector<CacheEntry> cache_entries();
/// How many entries are gone, how many files could not be deleted, and why not the first of them.
struct Cleared {
  int num_kernels = 0, num_left = 0;
  std::string error;
};
/// Deletes every entry, and what interrupted processes left beside them.
Cleared clear_cache();

/// Writes `cubin` as an entry of the pack or cache directory `dir`, which is made if missing. Atomic: a reader sees the
/// whole entry or none.
/// @throws std::system_error
void publish(const std::filesystem::path& dir, const KernelSource& source, const std::string& arch, const Cubin& cubin);

}  // namespace phalanx::jit
