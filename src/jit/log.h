// The library's messages: to stderr, from the level that PHALANX_LOG_LEVEL names upwards.
#pragma once

#include <string_view>

namespace phalanx::jit {

void log_debug(std::string_view message);
void log_info(std::string_view message);
void log_warning(std::string_view message);

}  // namespace phalanx::jit
