// One NVRTC compilation, and what its log says.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "jit/jit.h"

namespace phalanx::jit {

/// NVRTC's options for `arch`; part of every key.
std::vector<std::string> compile_flags(std::string_view arch);

/// Registers, spills, stack, shared memory and warnings out of the log that `compile_flags` makes ptxas write.
CompileInfo parse_log(const std::string& log);

}  // namespace phalanx::jit
