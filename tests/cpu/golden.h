// Tables of what a planner chooses, kept beside the tests: a change shows as a diff. PHALANX_UPDATE_GOLDEN=1 writes
// them anew.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace phalanx::test {

inline void check_golden(const char* file, const std::string& table) {
  const std::filesystem::path path = std::filesystem::path(PHALANX_SOURCE_DIR) / "tests/cpu" / file;
  if (std::getenv("PHALANX_UPDATE_GOLDEN")) std::ofstream(path) << table;
  std::ostringstream golden;
  golden << std::ifstream(path).rdbuf();
  std::istringstream wanted(golden.str()), actual(table);
  std::string wanted_line, actual_line;
  while (std::getline(actual, actual_line)) {
    ASSERT_TRUE(std::getline(wanted, wanted_line)) << "missing in " << path << ": " << actual_line;
    EXPECT_EQ(actual_line, wanted_line);
  }
  EXPECT_FALSE(std::getline(wanted, wanted_line)) << "no longer planned: " << wanted_line;
}

}  // namespace phalanx::test
