// How the command writes numbers, and where.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace phalanx::cli {

using Json = nlohmann::ordered_json;

/// "1.5 MiB".
std::string human_bytes(std::uintmax_t bytes);

/// @throws std::runtime_error when the file cannot be written, for want of room too
void write_file(const std::filesystem::path& path, const std::string& text);

/// Writes `value`, indented, to `path` as `write_file` does; "-" is standard output.
void write_json(const std::filesystem::path& path, const Json& value);

/// The middle of `values`, the mean of the middle two when their number is even; 0 of none.
double median(std::vector<double> values);

}  // namespace phalanx::cli
