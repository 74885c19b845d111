// Every kernel that a planner can return compiles for SM90a, without spills, stack or a word from ptxas.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <thread>

#include "jit/jit.h"
#include "jit/kernels.h"
#include "phalanx/status.h"

namespace phalanx::jit {
namespace {

struct Outcome {
  CompileInfo info;
  std::string error;
};

// From the cache if it was compiled before: an entry keeps what ptxas said, and knows every byte that it was made from.
Outcome try_compile(const KernelSource& kernel) {
  try {
    return {get_cubin(kernel, "sm_90a")->info, ""};
  } catch (const Error& error) {
    return {{}, error.what()};
  }
}

TEST(AllKernels, HaveTheirOwnNamesAndTexts) {
  std::set<std::string> names, texts;
  for (const KernelSource& kernel : all_kernels()) {
    EXPECT_TRUE(names.insert(kernel.name).second) << kernel.name;
    EXPECT_TRUE(texts.insert(kernel.text).second) << kernel.text;
    EXPECT_EQ(kernel.name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_"), std::string::npos) << kernel.name;
  }
}

TEST(AllKernels, CompileWithoutSpillsStackOrWarnings) {
  const auto kernels = all_kernels();
  ASSERT_GT(kernels.size(), 12u) << "there are GEMMs besides the twelve quantisation kernels";
  std::vector<Outcome> outcomes(kernels.size());
  std::atomic<std::size_t> next = 0;
  {
    std::vector<std::jthread> threads;
    for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
      threads.emplace_back([&] {
        for (std::size_t k = next++; k < kernels.size(); k = next++) outcomes[k] = try_compile(kernels[k]);
      });
    }
  }
  for (std::size_t k = 0; k < kernels.size(); ++k) {
    SCOPED_TRACE(kernels[k].name);
    const CompileInfo& info = outcomes[k].info;
    if (!outcomes[k].error.empty()) {
      ADD_FAILURE() << outcomes[k].error;
      continue;
    }
    EXPECT_GT(info.registers, 0);
    EXPECT_EQ(info.spill_bytes, 0);
    EXPECT_EQ(info.stack_bytes, 0);
    for (const std::string& warning : info.warnings) ADD_FAILURE() << warning;
  }
}

}  // namespace
}  // namespace phalanx::jit
