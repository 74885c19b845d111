// Ranks that seem to have done so many operations that their epochs need more than 32 bits. For the CPU backend and for
// simulated kernels.
#pragma once

#include <algorithm>

#include "cpu/ep.h"
#include "tests/cpu/ep_rounds.h"

namespace phalanx::test {

/// Operations that have been, and the one that has written flags and words last. Credits are always of the last one.
struct EpPast {
  u64 done, written;
};
inline constexpr EpPast kEpPasts[] = {
    {(u64{1} << 32) - 3, (u64{1} << 32) - 3}, {u64{3} << 30, 0}, {(u64{1} << 32) + 1, u64{1} << 30}};

inline EpPast wanted_past;

/// In the place of a dispatch: what this rank's memory would hold.
inline void write_past(const EpDispatchParams& p) {
  const EpLayout& l = p.c.layout;
  const auto fill = [&](i64 begin, i64 end, u64 value) {
    u8* mine = p.c.peers[p.c.rank];
    std::fill(reinterpret_cast<u64*>(mine + begin), reinterpret_cast<u64*>(mine + end), value);
  };
  fill(l.epochs, l.dispatch_credit, wanted_past.done);
  fill(l.dispatch_credit, l.route_flags, ep_flag(wanted_past.done, 0, 0));
  fill(l.route_flags, l.buffers, ep_flag(wanted_past.written, 0, 0));
  for (int i = 0; i < p.c.shape.num_buffers; ++i) {
    const i64 words = l.buffers + i * l.buffer_stride;
    fill(words, words + l.tokens, ep_word(wanted_past.written, 0));
  }
}

/// Of all ranks. The problem is any that fits them.
inline void begin_after(const EpPast& past, std::vector<ExpertParallel>& eps, const EpProblem& p) {
  wanted_past = past;
  const cpu::EpStandIn writer{1, 0, write_past, nullptr};
  const cpu::EpStandIn* before = cpu::ep_stand_in.exchange(&writer);
  for (int r = 0; r < p.num_ranks(); ++r) {
    Rank mine(p, r, eps[r], eps[r].max_rows(), false);
    eps[r].dispatch(mine.args);
  }
  cpu::ep_stand_in = before;
}

}  // namespace phalanx::test
