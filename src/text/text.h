// Text by {fmt}. Its formatting is compiled once, in text.cpp: a file that compiles it for itself takes six seconds
// more.
#pragma once

#include <fmt/format.h>

#include <cstdio>
#include <string>

namespace phalanx {

std::string format_arguments(fmt::string_view format, fmt::format_args args);

/// What fmt::format and fmt::print do.
template <class... Args>
std::string format_text(fmt::format_string<Args...> format, Args&&... args) {
  return format_arguments(format, fmt::make_format_args(args...));
}
template <class... Args>
void print_text(std::FILE* file, fmt::format_string<Args...> format, Args&&... args) {
  std::fputs(format_arguments(format, fmt::make_format_args(args...)).c_str(), file);
}
template <class... Args>
void print_text(fmt::format_string<Args...> format, Args&&... args) {
  std::fputs(format_arguments(format, fmt::make_format_args(args...)).c_str(), stdout);
}

}  // namespace phalanx
