// What the tests of several folders share.
#pragma once

#include <gtest/gtest.h>

#include <exception>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "phalanx/status.h"

namespace phalanx::test {

/// An Error of that code whose message has all the words.
template <class Call>
void expect_error(ErrorCode code, const std::vector<std::string>& words, Call&& call) {
  try {
    call();
    ADD_FAILURE() << "no error; expected one about " << words.front();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    for (const std::string& word : words)
      EXPECT_NE(std::string(error.what()).find(word), std::string::npos)
          << "no \"" << word << "\" in: " << error.what();
  }
}

/// f(rank) on a thread each; the first exception is thrown here.
inline void on_ranks(int num_ranks, const std::function<void(int)>& f) {
  std::vector<std::exception_ptr> errors(num_ranks);
  {
    std::vector<std::jthread> threads;
    for (int r = 0; r < num_ranks; ++r)
      threads.emplace_back([&, r] {
        try {
          f(r);
        } catch (...) {
          errors[r] = std::current_exception();
        }
      });
  }
  for (const auto& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace phalanx::test
