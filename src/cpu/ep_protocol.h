// What dispatch and combine between threads share: flags and waits, and the handle.
#pragma once

#include <algorithm>
#include <atomic>
#include <string>

#include "cpu/ep.h"
#include "phalanx/status.h"

namespace phalanx::cpu {

// One rank's half of one operation: its epoch, its flags, its waits.
class EpOperation {
 public:
  EpOperation(const EpCommon& c, EpSequence sequence) : c_(c), epoch_(*epoch_word(sequence) + 1), sequence_(sequence) {}

  /// Ends it; call only when nothing failed.
  void finish() { *epoch_word(sequence_) = epoch_; }

  u64 epoch() const { return epoch_; }

  /// Rank r's memory at `offset` of this operation's buffer.
  u8* buffer(int r, i64 offset) const {
    return c_.peers[r] + c_.layout.buffers + i64(epoch_ % c_.shape.num_buffers) * c_.layout.buffer_stride + offset;
  }

  u64* word(int r, i64 offset, int index) const { return reinterpret_cast<u64*>(c_.peers[r] + offset) + index; }

  void signal(u64* flag, u64 value) const {
    delay();
    std::atomic_ref(*flag).store(value, std::memory_order_release);
  }

  /// Until a flag of this rank has the epoch and count of `expected`, or more. False: it failed, and the status says
  /// why.
  bool wait(EpPhase phase, int peer, u64* flag, u64 expected) const;

  /// The peers have read what this rank has put into the same buffer before.
  bool wait_for_credits(EpPhase phase, i64 credits) const;

  /// An operation whose two halves are one call does not stand between the halves of another: each would receive what
  /// the other has sent.
  bool follows(EpSequence recv, EpPhase phase) const;

  /// Says why; always false.
  bool fail(EpState state, EpPhase phase, int peer, u64 expected, u64 seen, u64 who = 0) const;

  void give_credits(i64 credits) const;

  void delay() const {
    if (const auto hook = ep_delay.load(std::memory_order_relaxed)) hook(c_.rank);
  }

 private:
  u64* epoch_word(EpSequence s) const { return word(c_.rank, c_.layout.epochs, s * c_.shape.num_ctas); }
  EpWords* words(int r) const { return reinterpret_cast<EpWords*>(c_.peers[r]); }

  const EpCommon& c_;
  const u64 epoch_;
  const EpSequence sequence_;
};

// --- what the handle says -------------------------------------------------------------------------------------------

struct EpHandle {
  explicit EpHandle(const EpCommon& common) : c(common), l(common.handle_layout) {}

  /// Where the handle is given, this rank's tokens are those that it was made of.
  void check_tokens(const char* argument) const {
    if (num_tokens(c.rank) == c.num_tokens) return;
    throw Error(ErrorCode::invalid_argument, std::string(argument) + " has " + std::to_string(c.num_tokens) +
                                                 " tokens, expected " + std::to_string(num_tokens(c.rank)) +
                                                 ", those of the dispatch that made the handle");
  }

  i64 choice(int source, i64 token) const { return (i64(source) * c.shape.max_tokens + token) * c.shape.topk; }
  int& num_tokens(int source) const { return c.handle[l.num_tokens + source]; }
  int* offsets() const { return c.handle + l.offsets; }
  int* counts() const { return c.handle + l.counts; }
  int* experts(i64 token) const { return c.handle + l.experts + token * c.shape.topk; }
  int* rows(int source, i64 token) const { return c.handle + l.rows + choice(source, token); }
  float* weights(int source, i64 token) const {
    return reinterpret_cast<float*>(c.handle + l.weights) + choice(source, token);
  }
  /// Source s's token t has an expert here.
  bool is_here(int source, i64 token) const {
    const int* row = rows(source, token);
    return std::any_of(row, row + c.shape.topk, [](int r) { return r != kEpNotHere; });
  }
  /// This rank's token t has an expert on rank r.
  bool goes_to(int r, i64 token) const {
    const int* e = experts(token);
    return std::any_of(e, e + c.shape.topk,
                       [&](int expert) { return ep_rank_of(c.first_expert, c.shape.num_ranks, expert) == r; });
  }

  const EpCommon& c;
  const EpHandleLayout& l;
};

/// The slot in rank `at`'s memory of a source's token; `base` and `bytes` of the area that holds it.
inline u8* ep_slot(const EpOperation& op, const EpCommon& c, int at, int source, i64 token, i64 base, i64 bytes) {
  return op.buffer(at, base) + (i64(ep_peer_idx(at, source)) * c.shape.max_tokens + token) * bytes;
}

}  // namespace phalanx::cpu
