#include <sys/utsname.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <thread>

#include "cli/commands.h"
#include "cli/format.h"
#include "cuda/cuda.h"
#include "jit/jit.h"
#include "phalanx/status.h"
#include "phalanx/version.h"
#include "text/text.h"

extern char** environ;

namespace phalanx::cli {
namespace {

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

std::string system_name() {
  utsname name{};
  uname(&name);
  return format_text("{} {} {}", name.sysname, name.release, name.machine);
}

// The variables that change what Phalanx finds. Others stay private: this is pasted into bug reports.
Json environment() {
  constexpr const char* kPrefixes[] = {
      "PHALANX_", "XDG_CACHE_HOME=", "CUDA_", "NVIDIA_VISIBLE_DEVICES=", "LD_LIBRARY_PATH=", "OPENBLAS_", "OMP_"};
  Json variables = Json::object();
  for (char** entry = environ; *entry != nullptr; ++entry) {
    for (const char* prefix : kPrefixes) {
      if (std::strncmp(*entry, prefix, std::strlen(prefix)) != 0) continue;
      const std::string text = *entry;
      variables[text.substr(0, text.find('='))] = text.substr(text.find('=') + 1);
    }
  }
  return variables;
}

Json gpus() {
  Json list = Json::array();
  for (const auto& gpu : cuda::devices()) {
    list.push_back({{"ordinal", gpu.ordinal},
                    {"name", gpu.name},
                    {"arch", gpu.arch()},
                    {"sms", gpu.num_sms},
                    {"clock_mhz", gpu.clock_khz / 1000},
                    {"memory_bytes", gpu.memory_bytes},
                    {"l2_bytes", gpu.l2_bytes},
                    // Every kernel so far is for SM90a.
                    {"supported", gpu.is_hopper()}});
  }
  return list;
}

// Which GPUs can be ranks of one group.
Json links() {
  Json list = Json::array();
  const auto devices = cuda::devices();
  for (const auto& from : devices) {
    for (const auto& to : devices) {
      if (from.ordinal == to.ordinal) continue;
      const auto peer = cuda::peer_info(from.ordinal, to.ordinal);
      list.push_back({{"from", from.ordinal},
                      {"to", to.ordinal},
                      {"access", peer.access},
                      {"atomics", peer.atomics},
                      {"performance_rank", peer.performance_rank}});
    }
  }
  return list;
}

Json packs() {
  Json list = Json::array();
  for (const auto& directory : jit::pack_dirs()) {
    std::error_code ignored;
    list.push_back({{"directory", directory.string()}, {"exists", std::filesystem::is_directory(directory, ignored)}});
  }
  return list;
}

Json tuned() {
  const auto path = jit::tuned_path();
  Json choices{{"file", path.string()}, {"choices", 0}, {"error", ""}};
  try {
    choices["choices"] = read_tuned(path).entries().size();
  } catch (const Error& error) {
    choices["error"] = error.what();
  }
  return choices;
}

Json collect() {
  const auto driver = cuda::driver_info();
  const auto nvrtc = jit::nvrtc_info();
  const auto entries = jit::cache_entries();
  std::uintmax_t cache_bytes = 0;
  for (const auto& entry : entries) cache_bytes += entry.bytes;

  Json info;
  info["version"] = version();
  info["system"] = system_name();
  info["compiler"] = __VERSION__;
  info["cpu"] = {{"name", cpu_name()}, {"threads", std::thread::hardware_concurrency()}};
  info["driver"] = {{"available", driver.available}, {"version", driver.version}, {"error", driver.error}};
  info["gpus"] = gpus();
  info["links"] = links();
  info["nvrtc"] = {{"available", nvrtc.available},
                   {"version", format_text("{}.{}", nvrtc.major, nvrtc.minor)},
                   {"path", nvrtc.path},
                   {"error", nvrtc.error}};
  info["cache"] = {{"directory", jit::cache_dir().string()}, {"entries", entries.size()}, {"bytes", cache_bytes}};
  info["packs"] = packs();
  info["tuned"] = tuned();
  info["environment"] = environment();
  return info;
}

void print_line(std::string_view label, std::string_view value) { print_text("{:<12}{}\n", label, value); }

void print_gpus(const Json& list) {
  if (list.empty()) print_line("GPU", "none: operations run on the CPU");
  for (const auto& gpu : list) {
    print_line(format_text("GPU {}", gpu["ordinal"].get<int>()),
               format_text("{}, {}, {} SMs, {} MHz, {}, L2 {}{}", gpu["name"].get<std::string>(),
                           gpu["arch"].get<std::string>(), gpu["sms"].get<int>(), gpu["clock_mhz"].get<int>(),
                           human_bytes(gpu["memory_bytes"].get<std::uintmax_t>()),
                           human_bytes(gpu["l2_bytes"].get<std::uintmax_t>()),
                           gpu["supported"].get<bool>() ? "" : " (not supported: needs sm_90)"));
  }
}

void print_links(const Json& list) {
  for (const auto& link : list) {
    print_line("link", format_text("GPU {} to GPU {}: {}", link["from"].get<int>(), link["to"].get<int>(),
                                   !link["access"].get<bool>()   ? "no access"
                                   : link["atomics"].get<bool>() ? "peer access with atomics, as over NVLink"
                                                                 : "peer access without atomics, as over PCIe"));
  }
}

void print_text(const Json& info) {
  print_line("phalanx", format_text("{}, built with g++ {}", info["version"].get<std::string>(),
                                    info["compiler"].get<std::string>()));
  print_line("system", info["system"].get<std::string>());
  print_line("CPU", format_text("{}, {} threads", info["cpu"]["name"].get<std::string>(),
                                info["cpu"]["threads"].get<unsigned>()));
  const int driver = info["driver"]["version"].get<int>();
  print_line("driver", info["driver"]["available"].get<bool>()
                           ? format_text("CUDA {}.{}", driver / 1000, driver % 1000 / 10)
                           : "none: " + info["driver"]["error"].get<std::string>());
  print_gpus(info["gpus"]);
  print_links(info["links"]);
  print_line("NVRTC", info["nvrtc"]["available"].get<bool>()
                          ? format_text("{}, {}", info["nvrtc"]["version"].get<std::string>(),
                                        info["nvrtc"]["path"].get<std::string>())
                          : "none: " + info["nvrtc"]["error"].get<std::string>());
  print_line("cache", format_text("{}: {} kernels, {}", info["cache"]["directory"].get<std::string>(),
                                  info["cache"]["entries"].get<std::size_t>(),
                                  human_bytes(info["cache"]["bytes"].get<std::uintmax_t>())));
  for (const auto& pack : info["packs"]) {
    print_line("pack", pack["directory"].get<std::string>() + (pack["exists"].get<bool>() ? "" : " (missing)"));
  }
  const auto& tuned = info["tuned"];
  print_line("tuned", tuned["error"] == "" ? format_text("{}: {} choices", tuned["file"].get<std::string>(),
                                                         tuned["choices"].get<std::size_t>())
                                           : tuned["error"].get<std::string>());
  for (const auto& [name, value] : info["environment"].items()) {
    print_line("variable", format_text("{}={}", name, value.get<std::string>()));
  }
}

}  // namespace

int info(const InfoOptions& options) {
  const Json info = collect();
  if (options.json) {
    write_json("-", info);
  } else {
    print_text(info);
  }
  return 0;
}

}  // namespace phalanx::cli
