// What the pretended driver has seen, for tests that are linked with it.
#pragma once

#include <atomic>

namespace phalanx::test {

constexpr int kHoppers = 2, kDevices = 3;  // the last is no Hopper
constexpr int kSms = 132;

struct PretendedDriver {
  std::atomic<int> loads{0}, launches{0};
  std::atomic<int> launch_error{0};   ///< what the next launches return
  std::atomic<int> context_error{0};  ///< and questions for the current context

  // Of the last launch; of one thread.
  int device = -1;
  unsigned num_ctas = 0;
  void* stream = nullptr;
  bool programmatic = false;
  bool leaves_sms = false;  ///< only products are launched here
};

PretendedDriver& pretended_driver();

}  // namespace phalanx::test
