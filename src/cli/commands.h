// The commands of `phalanx`. Each returns the process's exit code; errors are thrown.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "plan/tuned.h"

namespace phalanx::cli {

struct InfoOptions {
  bool json = false;
};
/// Prints what a bug report needs.
int info(const InfoOptions& options);

struct WarmupOptions {
  std::filesystem::path out;   ///< also write every cubin to this directory, which is then a pack
  std::filesystem::path json;  ///< write what ptxas said of every kernel
  std::string arch = "sm_90a";
  int jobs = 0;        ///< threads; 0 means one per core
  bool fresh = false;  ///< compile even what a cache or pack holds
};
/// Compiles every kernel of the library. Non-zero when one fails, spills, has a stack or a ptxas advisory.
int warmup(const WarmupOptions& options);

int cache_show(bool json);
int cache_clear();

struct BenchOptions {
  std::string device = "auto";  ///< auto, cpu, cuda or cuda:<ordinal>
  std::string out_dtype = "bf16";
  int m = 0, n = 0, k = 0;        ///< all zero: the sets
  std::vector<std::string> sets;  ///< of tests/cases/shapes.json; none: what suits the device
  int min_repeats = 5;
  double min_seconds = 0.25;  ///< repeat each shape for at least this long
  std::filesystem::path json;
};
/// The sets that `bench` knows: "prefill, decode, ...".
std::string names_of_sets();
/// Times `gemm_fp8` through the public API.
int bench(const BenchOptions& options);

struct BenchEpOptions {
  std::string device = "auto";  ///< cuda: all GPUs; cpu; auto: whichever there is
  int ranks = 0;                ///< 0: one a GPU, or two on the CPU
  int tokens = 0;               ///< of each rank
  int hidden = 7168, experts = 256, topk = 8;
  int num_sms = 0;
  bool latency = false;
  int repeats = 20;
  std::filesystem::path json;
};
/// Times dispatch and combine between ranks that are threads of this process.
int bench_ep(const BenchEpOptions& options);

struct TuneOptions {
  std::vector<std::string> shapes;  ///< "64x7168x2048"
  std::string device = "auto";
  std::string out_dtype = "bf16";
  int num_sms = 0;  ///< that the products may use; 0: all
  int rounds = 20;  ///< timed runs of each kernel
};
/// Measures every kernel on each shape, with a cold L2, and keeps those that beat the planner's in `jit::tuned_path()`.
int tune(const TuneOptions& options);

/// The choices in a file of `tune`'s; none if there is no such file.
/// @throws Error if `tune` did not write it
plan::TunedGemms read_tuned(const std::filesystem::path& path);

}  // namespace phalanx::cli
