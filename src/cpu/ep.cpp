#include "cpu/ep.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/convert.h"
#include "cpu/cpu.h"

namespace phalanx::cpu {

std::atomic<const EpStandIn*> ep_stand_in = nullptr;
std::atomic<void (*)(int)> ep_delay = nullptr;

namespace {

// One rank's half of one operation: its epoch, its flags, its waits.
class Operation {
 public:
  Operation(const EpCommon& c, EpSequence sequence)
      : c_(c), epoch_(words(c.rank)->epoch[sequence] + 1), sequence_(sequence) {}

  /// Ends it; call only when nothing failed.
  void finish() { words(c_.rank)->epoch[sequence_] = epoch_; }

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
  bool wait(EpPhase phase, int peer, u64* flag, u64 expected) const {
    delay();
    constexpr u64 kOrder = ~(u64{0xff} << 24);  // all but the format
    const std::atomic_ref value(*flag);
    const std::atomic_ref stop(words(c_.rank)->stop);
    const auto start = std::chrono::steady_clock::now();
    for (int spins = 0;; ++spins) {
      const u64 seen = value.load(std::memory_order_acquire);
      if ((seen & kOrder) >= (expected & kOrder)) {
        if (ep_flag_epoch(seen) != ep_flag_epoch(expected) || ep_flag_format(seen) == ep_flag_format(expected))
          return true;
        return fail(kEpMismatch, phase, peer, expected, seen);
      }
      if (const u64 who = stop.load(std::memory_order_relaxed))
        return fail(kEpAborted, phase, peer, expected, seen, who);
      if (u64((std::chrono::steady_clock::now() - start) / std::chrono::nanoseconds(1)) > c_.timeout_ns)
        return fail(kEpTimeout, phase, peer, expected, seen);
      if (spins < 100)
        std::this_thread::yield();
      else
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }

  /// The peers have read what this rank has put into the same buffer before.
  bool wait_for_credits(EpPhase phase, i64 credits) const {
    const u64 buffers = c_.shape.num_buffers;
    for (int r = 0; r < c_.shape.num_ranks; ++r) {
      if (r != c_.rank && epoch_ > buffers &&
          !wait(phase, r, word(c_.rank, credits, r), ep_flag(epoch_ - buffers, 0, 0)))
        return false;
    }
    return true;
  }

  void give_credits(i64 credits) const {
    for (int r = 0; r < c_.shape.num_ranks; ++r)
      if (r != c_.rank) signal(word(r, credits, c_.rank), ep_flag(epoch_, 0, 0));
  }

  void delay() const {
    if (const auto hook = ep_delay.load(std::memory_order_relaxed)) hook(c_.rank);
  }

 private:
  EpWords* words(int r) const { return reinterpret_cast<EpWords*>(c_.peers[r]); }

  bool fail(EpState state, EpPhase phase, int peer, u64 expected, u64 seen, u64 who = 0) const {
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

  const EpCommon& c_;
  const u64 epoch_;
  const EpSequence sequence_;
};

// --- what the handle says -------------------------------------------------------------------------------------------

struct Handle {
  explicit Handle(const EpCommon& common) : c(common), l(common.handle_layout) {}

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

int num_local_experts(const EpCommon& c) { return c.first_expert[c.rank + 1] - c.first_expert[c.rank]; }

u8* token_slot(const Operation& op, const EpCommon& c, int at, int source, i64 token) {
  const i64 slot = i64(ep_peer_idx(at, source)) * c.shape.max_tokens + token;
  return op.buffer(at, c.layout.tokens) + slot * c.layout.token_slot;
}

u8* sum_slot(const Operation& op, const EpCommon& c, int at, int source, i64 token) {
  const i64 slot = i64(ep_peer_idx(at, source)) * c.shape.max_tokens + token;
  return op.buffer(at, c.layout.sums) + slot * c.layout.sum_slot;
}

// Of one CTA and one warp.
int token_flag_idx(int source) { return source * kEpDispatchSendWarps; }
int sum_flag_idx(int source) { return source * kEpCombineSendWarps; }

// --- dispatch -------------------------------------------------------------------------------------------------------

i64 element_size(EpFormat format) { return format == kEpE4m3 ? 1 : 2; }

/// This rank's tokens in the format that is sent: as they come, or quantised here.
class Source {
 public:
  explicit Source(const EpDispatchParams& p) : p_(p) {
    const i64 tokens = p.c.num_tokens, hidden = p.c.shape.hidden, blocks = ceil_div<i64>(hidden, 128);
    if (p.x_format == p.format || tokens == 0) return;
    data_.resize(tokens * hidden);
    scales_.resize(tokens * blocks);
    cpu::quantize(
        row_major(const_cast<void*>(p.x), DType::bf16, tokens, hidden, {}, p.x_stride),
        {row_major(data_.data(), DType::e4m3, tokens, hidden), row_major(scales_.data(), DType::f32, tokens, blocks)},
        ScaleShape::row_1x128, p.pow2_scales);
  }

  const u8* data(i64 token) const {
    if (!data_.empty()) return data_.data() + token * p_.c.shape.hidden;
    return static_cast<const u8*>(p_.x) + token * p_.x_stride * element_size(p_.format);
  }
  float scale(i64 token, i64 block) const {
    if (!data_.empty()) return scales_[token * ceil_div<i64>(p_.c.shape.hidden, 128) + block];
    return p_.x_scales[token * p_.x_scale_stride_row + block * p_.x_scale_stride_col];
  }

 private:
  const EpDispatchParams& p_;
  std::vector<u8> data_;
  std::vector<float> scales_;
};

i64 topk_idx(const EpDispatchParams& p, i64 token, int k) {
  const i64 at = token * p.idx_stride + k;
  return p.idx_is_64 ? static_cast<const i64*>(p.topk_idx)[at] : static_cast<const int*>(p.topk_idx)[at];
}

/// Keeps this rank's routing in the handle, in the form in which it is sent.
void keep_routing(const EpDispatchParams& p, const Handle& handle) {
  const EpCommon& c = p.c;
  handle.num_tokens(c.rank) = c.num_tokens;
  for (i64 t = 0; t < c.num_tokens; ++t) {
    for (int k = 0; k < c.shape.topk; ++k) {
      const i64 expert = topk_idx(p, t, k);
      handle.experts(t)[k] = ep_rank_of(c.first_expert, c.shape.num_ranks, expert) < 0 ? -1 : int(expert);
      handle.weights(c.rank, t)[k] = p.topk_weights ? p.topk_weights[t * p.weights_stride + k] : 1.0f;
    }
  }
}

void send_routing(const EpCommon& c, const Operation& op, const Handle& handle) {
  const i64 choices = i64(c.num_tokens) * c.shape.topk, at = handle.choice(c.rank, 0) * 4;
  for (int r = 0; r < c.shape.num_ranks; ++r) {
    if (r == c.rank) continue;
    op.delay();
    std::memcpy(op.buffer(r, c.layout.experts) + at, handle.experts(0), choices * 4);
    std::memcpy(op.buffer(r, c.layout.weights) + at, handle.weights(c.rank, 0), choices * 4);
    std::memcpy(op.buffer(r, c.layout.headers) + c.rank * 16, &c.num_tokens, sizeof(int));
    op.signal(op.word(r, c.layout.route_flags, c.rank), ep_flag(op.epoch(), kEpRouting, 1));
  }
}

void send_tokens(const EpDispatchParams& p, const Operation& op, const Handle& handle) {
  const EpCommon& c = p.c;
  const Source source(p);
  for (i64 t = 0; t < c.num_tokens; ++t) {
    for (int r = 0; r < c.shape.num_ranks; ++r) {
      if (r == c.rank || !handle.goes_to(r, t)) continue;
      op.delay();
      u8* slot = token_slot(op, c, r, c.rank, t);
      std::memcpy(slot, source.data(t), c.shape.hidden * element_size(p.format));
      if (p.format == kEpE4m3) {
        float* scales = reinterpret_cast<float*>(slot + ep_scales_offset(c.shape.hidden));
        for (int b = 0; b < ceil_div(c.shape.hidden, 128); ++b) scales[b] = source.scale(t, b);
      }
      op.signal(op.word(r, c.layout.token_flags, token_flag_idx(c.rank)), ep_flag(op.epoch(), p.format, u32(t) + 1));
    }
  }
}

bool receive_routing(const EpCommon& c, const Operation& op, const Handle& handle) {
  for (int s = 0; s < c.shape.num_ranks; ++s) {
    if (s == c.rank) continue;
    if (!op.wait(kEpPhaseRouting, s, op.word(c.rank, c.layout.route_flags, s), ep_flag(op.epoch(), kEpRouting, 1)))
      return false;
    std::memcpy(&handle.num_tokens(s), op.buffer(c.rank, c.layout.headers) + s * 16, sizeof(int));
    const i64 bytes = i64(handle.num_tokens(s)) * c.shape.topk * 4;
    std::memcpy(handle.weights(s, 0), op.buffer(c.rank, c.layout.weights) + handle.choice(s, 0) * 4, bytes);
  }
  return true;
}

/// Rows in order of (expert, source, token).
void assign_rows(const EpDispatchParams& p, const Operation& op, const Handle& handle) {
  const EpCommon& c = p.c;
  const int first = c.first_expert[c.rank], num_local = num_local_experts(c);
  const auto for_each_choice = [&](auto&& f) {
    for (int s = 0; s < c.shape.num_ranks; ++s) {
      const int* theirs = reinterpret_cast<int*>(op.buffer(c.rank, c.layout.experts)) + handle.choice(s, 0);
      const int* experts = s == c.rank ? handle.experts(0) : theirs;
      for (i64 i = 0; i < i64(handle.num_tokens(s)) * c.shape.topk; ++i) f(experts[i] - first, handle.rows(s, 0)[i]);
    }
  };
  std::fill_n(handle.counts(), num_local, 0);
  for_each_choice([&](int expert, int&) {
    if (expert >= 0 && expert < num_local) ++handle.counts()[expert];
  });
  handle.offsets()[0] = 0;
  for (int e = 0; e < num_local; ++e)
    handle.offsets()[e + 1] = handle.offsets()[e] + ceil_div(handle.counts()[e], p.alignment) * p.alignment;
  std::vector<int> next(handle.offsets(), handle.offsets() + num_local);
  for_each_choice([&](int expert, int& row) {
    if (expert < 0 || expert >= num_local) {
      row = kEpNotHere;
    } else {
      row = next[expert]++;
    }
  });
}

void write_padding(const EpDispatchParams& p, const Handle& handle) {
  const int hidden = p.c.shape.hidden;
  for (int e = 0; e < num_local_experts(p.c); ++e) {
    const int end = std::min(handle.offsets()[e + 1], p.capacity);
    for (i64 row = handle.offsets()[e] + handle.counts()[e]; row < end; ++row) {
      const i64 size = element_size(p.format);
      std::memset(static_cast<u8*>(p.rows) + row * p.row_stride * size, 0, hidden * size);
      for (int b = 0; p.row_scales && b < ceil_div(hidden, 128); ++b) p.row_scales[row + b * p.row_scale_stride] = 1;
      if (p.row_weights) p.row_weights[row] = 0;
    }
  }
}

bool receive_tokens(const EpDispatchParams& p, const Operation& op, const Handle& handle) {
  const EpCommon& c = p.c;
  const Source mine(p);
  const int hidden = c.shape.hidden, blocks = ceil_div(hidden, 128);
  const i64 size = element_size(p.format);
  for (int s = 0; s < c.shape.num_ranks; ++s) {
    for (i64 t = 0; t < handle.num_tokens(s); ++t) {
      if (!handle.is_here(s, t)) continue;
      const u8* slot = nullptr;
      if (s != c.rank) {
        if (!op.wait(kEpPhaseTokens, s, op.word(c.rank, c.layout.token_flags, token_flag_idx(s)),
                     ep_flag(op.epoch(), p.format, u32(t) + 1)))
          return false;
        slot = token_slot(op, c, c.rank, s, t);
      }
      const float* scales = reinterpret_cast<const float*>(slot + ep_scales_offset(hidden));
      for (int k = 0; k < c.shape.topk; ++k) {
        const i64 row = handle.rows(s, t)[k];
        if (row < 0 || row >= p.capacity) continue;
        std::memcpy(static_cast<u8*>(p.rows) + row * p.row_stride * size, slot ? slot : mine.data(t), hidden * size);
        for (int b = 0; p.row_scales && b < blocks; ++b)
          p.row_scales[row + b * p.row_scale_stride] = slot ? scales[b] : mine.scale(t, b);
        if (p.row_weights) p.row_weights[row] = handle.weights(s, t)[k];
      }
    }
  }
  return true;
}

bool dispatch_receive(const EpDispatchParams& p, const Handle& handle) {
  const EpCommon& c = p.c;
  Operation op(c, kEpDispatchRecv);
  if (p.route) {
    if (!receive_routing(c, op, handle)) return false;
    assign_rows(p, op, handle);
  }
  const int num_local = num_local_experts(c);
  if (p.offsets) std::copy_n(handle.offsets(), num_local + 1, p.offsets);
  if (p.counts) std::copy_n(handle.counts(), num_local, p.counts);
  if (p.copy) {
    if (const int needed = handle.offsets()[num_local]; needed > p.capacity) {
      c.status->rows_given = p.capacity;
      c.status->rows_needed = needed;
    }
    write_padding(p, handle);
    if (!receive_tokens(p, op, handle)) return false;
  }
  op.give_credits(c.layout.dispatch_credit);
  op.finish();
  return true;
}

// --- combine --------------------------------------------------------------------------------------------------------

// FMA on machines that have it; the library's, with the same bits, elsewhere.
[[gnu::target_clones("arch=haswell", "default")]] void add_row(const Bf16* row, float weight, float* sum, int count) {
  for (int i = 0; i < count; ++i) sum[i] = __builtin_fmaf(weight, std::bit_cast<float>(u32(row[i].bits) << 16), sum[i]);
}

/// What this rank's experts made of a token, and the values of its rows.
void sum_rows(const EpCombineParams& p, const Handle& handle, int source, i64 token, float* sum, float* values) {
  const int hidden = p.c.shape.hidden;
  std::fill_n(sum, hidden, 0.0f);
  for (int k = 0; k < p.c.shape.topk; ++k) {
    const i64 row = handle.rows(source, token)[k];
    const bool has_row = row >= 0 && row < p.capacity;
    values[k] = has_row && p.values ? p.row_values[row] : 0.0f;
    if (!has_row) continue;
    add_row(static_cast<const Bf16*>(p.rows) + row * p.row_stride, p.weighted ? handle.weights(source, token)[k] : 1.0f,
            sum, hidden);
  }
}

EpFormat sums_format(const EpCombineParams& p) { return p.values ? kEpSumsAndValues : kEpSums; }

void send_sums(const EpCombineParams& p, const Operation& op, const Handle& handle) {
  const EpCommon& c = p.c;
  const int hidden = c.shape.hidden;
  std::vector<float> sum(hidden), values(c.shape.topk);
  for (int s = 0; s < c.shape.num_ranks; ++s) {
    for (i64 t = 0; s != c.rank && t < handle.num_tokens(s); ++t) {
      if (!handle.is_here(s, t)) continue;
      op.delay();
      sum_rows(p, handle, s, t, sum.data(), values.data());
      u8* slot = sum_slot(op, c, s, c.rank, t);
      Bf16* out = reinterpret_cast<Bf16*>(slot);
      for (int i = 0; i < hidden; ++i) out[i] = from_f32<Bf16>(sum[i]);
      if (p.values) std::memcpy(slot + ep_bf16_bytes(hidden), values.data(), values.size() * 4);
      op.signal(op.word(s, c.layout.sum_flags, sum_flag_idx(c.rank)), ep_flag(op.epoch(), sums_format(p), u32(t) + 1));
    }
  }
}

bool receive_sums(const EpCombineParams& p, const Operation& op, const Handle& handle) {
  const EpCommon& c = p.c;
  const int hidden = c.shape.hidden, topk = c.shape.topk;
  std::vector<float> total(hidden), sum(hidden), values(topk);
  for (i64 t = 0; t < c.num_tokens; ++t) {
    const Bf16* residual = static_cast<const Bf16*>(p.residual) + t * p.residual_stride;
    for (int i = 0; i < hidden; ++i) total[i] = 0.0f;
    if (p.values) std::fill_n(p.topk_values + t * topk, topk, 0.0f);
    for (int r = 0; r < c.shape.num_ranks; ++r) {
      if (!handle.goes_to(r, t)) continue;
      if (r == c.rank) {
        sum_rows(p, handle, r, t, sum.data(), values.data());
        for (int i = 0; i < hidden; ++i) total[i] += sum[i];
      } else {
        if (!op.wait(kEpPhaseSums, r, op.word(c.rank, c.layout.sum_flags, sum_flag_idx(r)),
                     ep_flag(op.epoch(), sums_format(p), u32(t) + 1)))
          return false;
        const u8* slot = sum_slot(op, c, c.rank, r, t);
        for (int i = 0; i < hidden; ++i) total[i] += to_f32(reinterpret_cast<const Bf16*>(slot)[i]);
        if (p.values) std::memcpy(values.data(), slot + ep_bf16_bytes(hidden), values.size() * 4);
      }
      for (int k = 0; p.values && k < topk; ++k) {
        if (ep_rank_of(c.first_expert, c.shape.num_ranks, handle.experts(t)[k]) == r)
          p.topk_values[t * topk + k] = values[k];
      }
    }
    Bf16* out = static_cast<Bf16*>(p.out) + t * p.out_stride;
    for (int i = 0; i < hidden; ++i) {
      if (p.residual) total[i] += to_f32(residual[i]);
      out[i] = from_f32<Bf16>(total[i]);
    }
  }
  return true;
}

}  // namespace

void ep_dispatch(const EpDispatchParams& p) {
  if (const EpStandIn* other = ep_stand_in) return other->dispatch(p);
  const Handle handle(p.c);
  if (p.c.send) {
    Operation op(p.c, kEpDispatchSend);
    if (!op.wait_for_credits(kEpPhaseDispatchCredit, p.c.layout.dispatch_credit)) return;
    if (p.route) {
      keep_routing(p, handle);
      send_routing(p.c, op, handle);
    }
    if (p.copy) send_tokens(p, op, handle);
    op.finish();
  }
  if (p.c.recv) dispatch_receive(p, handle);
}

void ep_combine(const EpCombineParams& p) {
  if (const EpStandIn* other = ep_stand_in) return other->combine(p);
  const Handle handle(p.c);
  if (p.c.send) {
    Operation op(p.c, kEpCombineSend);
    if (!op.wait_for_credits(kEpPhaseCombineCredit, p.c.layout.combine_credit)) return;
    send_sums(p, op, handle);
    op.finish();
  }
  if (p.c.recv) {
    Operation op(p.c, kEpCombineRecv);
    if (!receive_sums(p, op, handle)) return;
    op.give_credits(p.c.layout.combine_credit);
    op.finish();
  }
}

}  // namespace phalanx::cpu
