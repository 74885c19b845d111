#include "jit/compile.h"

#include <algorithm>
#include <chrono>
#include <regex>
#include <sstream>

#include "jit/nvrtc.h"
#include "jit/sources.h"
#include "phalanx/status.h"
#include "text/text.h"

namespace phalanx::jit {
namespace {

// A program of NVRTC's, with every device file at hand under the name by which it is included.
class Program {
 public:
  Program(const Nvrtc& nvrtc, const KernelSource& source) : nvrtc_(nvrtc) {
    std::vector<const char*> texts, names;
    for (const EmbeddedFile& file : device_sources()) {
      texts.push_back(file.text.data());
      names.push_back(file.name);
    }
    const std::string name = source.name + ".cu";
    const int result = nvrtc_.create_program(&program_, source.text.c_str(), name.c_str(),
                                             static_cast<int>(texts.size()), texts.data(), names.data());
    if (result != 0) {
      throw Error(ErrorCode::compilation_failed,
                  format_text("NVRTC could not start on kernel {}: {}", source.name, nvrtc_.error_string(result)));
    }
  }
  ~Program() { nvrtc_.destroy_program(&program_); }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  int compile(const std::vector<std::string>& flags) {
    std::vector<const char*> options;
    for (const std::string& flag : flags) options.push_back(flag.c_str());
    return nvrtc_.compile_program(program_, static_cast<int>(options.size()), options.data());
  }

  std::string log() const {
    std::string text = read(nvrtc_.log_size, nvrtc_.log);
    while (!text.empty() && (text.back() == '\0' || text.back() == '\n')) text.pop_back();
    return text;
  }
  std::string cubin() const { return read(nvrtc_.cubin_size, nvrtc_.cubin); }

 private:
  std::string read(int (*get_size)(Nvrtc::Program, std::size_t*), int (*get)(Nvrtc::Program, char*)) const {
    std::size_t size = 0;
    std::string bytes;
    if (get_size(program_, &size) == 0) bytes.resize(size);
    if (!bytes.empty() && get(program_, bytes.data()) != 0) bytes.clear();
    return bytes;
  }

  const Nvrtc& nvrtc_;
  Nvrtc::Program program_ = nullptr;
};

// The number in front of `unit`, 0 where the line has none.
int number_before(const std::string& line, const std::string& unit) {
  std::smatch match;
  return std::regex_search(line, match, std::regex("([0-9]+) " + unit)) ? std::stoi(match[1]) : 0;
}

}  // namespace

std::vector<std::string> compile_flags(std::string_view arch) {
  return {
      format_text("-arch={}", arch),
      "-std=c++20",
      "-default-device",     // constexpr functions that host and device share need no annotation
      "-no-source-include",  // nothing but the embedded files: the working directory is no business of ours
      "--ptxas-options=-v",  // registers and spills into the log
  };
}

CompileInfo parse_log(const std::string& log) {
  // Compiler warnings, ptxas warnings, and its advisories on wgmma, which it calls "info".
  static const auto& kWarning = *new std::regex(R"(warning\s*[:#]|\(C7[0-9]{3}\))");
  CompileInfo info;
  std::istringstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    // Once for the kernel and once for each function that was not inlined.
    info.stack_bytes += number_before(line, "bytes stack frame");
    info.spill_bytes += number_before(line, "bytes spill stores") + number_before(line, "bytes spill loads");
    info.registers = std::max(info.registers, number_before(line, "registers"));
    info.static_smem_bytes = std::max(info.static_smem_bytes, number_before(line, "bytes smem"));
    if (std::regex_search(line, kWarning)) info.warnings.push_back(line);
  }
  return info;
}

Cubin compile(const KernelSource& source, const std::string& arch) {
  const Nvrtc& nvrtc = require_nvrtc();
  const auto start = std::chrono::steady_clock::now();
  Program program(nvrtc, source);
  const int result = program.compile(compile_flags(arch));
  const std::string log = program.log();
  Cubin cubin;
  if (result == 0) cubin.bytes = program.cubin();
  if (cubin.bytes.empty()) {
    throw Error(ErrorCode::compilation_failed,
                format_text("NVRTC {}.{} ({}) failed on kernel {} for {}: {}\n{}", nvrtc.info.major, nvrtc.info.minor,
                            nvrtc.info.path, source.name, arch, nvrtc.error_string(result), log));
  }
  cubin.info = parse_log(log);
  cubin.info.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  cubin.info.nvrtc = format_text("{}.{}", nvrtc.info.major, nvrtc.info.minor);
  cubin.origin = Origin::compiled;
  return cubin;
}

}  // namespace phalanx::jit
