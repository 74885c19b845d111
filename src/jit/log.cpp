#include "jit/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <cstdlib>
#include <string>

namespace phalanx::jit {
namespace {

// A logger of our own: the process's default logger, if it uses spdlog too, is left alone.
spdlog::logger make_logger() {
  spdlog::logger logger("phalanx", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger.set_pattern("phalanx: %l: %v");
  logger.set_level(spdlog::level::warn);
  if (const char* name = std::getenv("PHALANX_LOG_LEVEL"); name != nullptr && *name != '\0') {
    // from_str answers `off` to what it does not know.
    const auto level = spdlog::level::from_str(name);
    if (level != spdlog::level::off || std::string(name) == "off") {
      logger.set_level(level);
    } else {
      logger.warn("PHALANX_LOG_LEVEL is '{}', expected trace, debug, info, warn, error or off", name);
    }
  }
  return logger;
}

spdlog::logger& logger() {
  static auto& instance = *new spdlog::logger(make_logger());
  return instance;
}

}  // namespace

void log_debug(std::string_view message) { logger().debug("{}", message); }
void log_info(std::string_view message) { logger().info("{}", message); }
void log_warning(std::string_view message) { logger().warn("{}", message); }

}  // namespace phalanx::jit
