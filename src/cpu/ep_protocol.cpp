#include "cpu/ep_protocol.h"

#include <chrono>
#include <thread>

namespace phalanx::cpu {

std::atomic<const EpStandIn*> ep_stand_in = nullptr;
std::atomic<void (*)(int)> ep_delay = nullptr;

bool EpOperation::wait(EpPhase phase, int peer, u64* flag, u64 expected) const {
  delay();
  const std::atomic_ref value(*flag);
  const std::atomic_ref stop(words(c_.rank)->stop);
  const auto start = std::chrono::steady_clock::now();
  for (int spins = 0;; ++spins) {
    const u64 seen = value.load(std::memory_order_acquire);
    if (ep_flag_has_come(seen, expected)) {
      if (ep_flag_epoch(seen) != ep_flag_epoch(expected) || ep_flag_format(seen) == ep_flag_format(expected))
        return true;
      return fail(kEpMismatch, phase, peer, expected, seen);
    }
    if (const u64 who = stop.load(std::memory_order_relaxed)) return fail(kEpAborted, phase, peer, expected, seen, who);
    if (u64((std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1)) > c_.timeout_ns)
      return fail(kEpTimeout, phase, peer, expected, seen);
    if (spins < 100)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

bool EpOperation::wait_for_credits(EpPhase phase, i64 credits) const {
  const u64 buffers = c_.shape.num_buffers;
  for (int r = 0; r < c_.shape.num_ranks; ++r) {
    if (r != c_.rank && epoch_ > buffers && !wait(phase, r, word(c_.rank, credits, r), ep_flag(epoch_ - buffers, 0, 0)))
      return false;
  }
  return true;
}

bool EpOperation::follows(EpSequence recv, EpPhase phase) const {
  const u64 received = *epoch_word(recv) + 1;
  return epoch_ == received || fail(kEpSendUnderWay, phase, c_.rank, ep_flag(received, 0, 0), ep_flag(epoch_, 0, 0));
}

void EpOperation::give_credits(i64 credits) const {
  for (int r = 0; r < c_.shape.num_ranks; ++r)
    if (r != c_.rank) signal(word(r, credits, c_.rank), ep_flag(epoch_, 0, 0));
}

bool EpOperation::fail(EpState state, EpPhase phase, int peer, u64 expected, u64 seen, u64 who) const {
  EpStatus& status = *c_.status;
  status.state = state;
  status.peer = peer;
  status.phase = phase;
  status.aborter = int(who) - 1;
  status.epoch = epoch_;
  status.expected = expected;
  status.seen = seen;
  return false;
}

}  // namespace phalanx::cpu
