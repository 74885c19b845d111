#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/ep_protocol.h"

namespace phalanx::cpu {
namespace {

u8* token_slot(const EpOperation& op, const EpCommon& c, int at, int source, i64 token) {
  return ep_slot(op, c, at, source, token, c.layout.tokens, c.layout.token_slot);
}

/// One for all of a source's tokens: it counts them.
int token_flag_idx(const EpCommon& c, int source) { return int(source * ep_flags_per_rank(c.shape)); }

i64 element_size(EpFormat format) { return format == kEpE4m3 ? 1 : 2; }

/// This rank's tokens in the format that is sent: as they come, or quantised here.
class Source {
 public:
  explicit Source(const EpDispatchParams& p) : p_(p) {
    const i64 tokens = p.c.num_tokens, hidden = p.c.shape.hidden, blocks = ep_num_blocks(p.c.shape.hidden);
    if (!p.copy || p.x_format == p.format || tokens == 0) return;
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
    if (!data_.empty()) return scales_[token * ep_num_blocks(p_.c.shape.hidden) + block];
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
void keep_routing(const EpDispatchParams& p, const EpHandle& handle) {
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

void send_routing(const EpDispatchParams& p, const EpOperation& op, const EpHandle& handle) {
  const EpCommon& c = p.c;
  const u64 header = ep_flag(op.epoch(), p.sent, c.num_tokens);
  const i64 choices = i64(c.num_tokens) * c.shape.topk, at = handle.choice(c.rank, 0) * 4;
  for (int r = 0; r < c.shape.num_ranks; ++r) {
    if (r == c.rank) continue;
    op.delay();
    std::memcpy(op.buffer(r, c.layout.choices) + at, handle.experts(0), choices * 4);
    std::memcpy(op.buffer(r, c.layout.weights) + at, handle.weights(c.rank, 0), choices * 4);
    std::memcpy(op.buffer(r, c.layout.headers) + c.rank * 8, &header, sizeof(header));
    op.signal(op.word(r, c.layout.route_flags, c.rank), ep_flag(op.epoch(), kEpRouting, 1));
  }
}

void send_tokens(const EpDispatchParams& p, const EpOperation& op, const EpHandle& handle, const Source& source) {
  const EpCommon& c = p.c;
  for (i64 t = 0; t < c.num_tokens; ++t) {
    for (int r = 0; r < c.shape.num_ranks; ++r) {
      if (r == c.rank || !handle.goes_to(r, t)) continue;
      op.delay();
      u8* slot = token_slot(op, c, r, c.rank, t);
      std::memcpy(slot, source.data(t), c.shape.hidden * element_size(p.format));
      if (p.format == kEpE4m3) {
        float* scales = reinterpret_cast<float*>(slot + ep_scales_offset(c.shape.hidden));
        for (int b = 0; b < ep_num_blocks(c.shape.hidden); ++b) scales[b] = source.scale(t, b);
      }
      op.signal(op.word(r, c.layout.token_flags, token_flag_idx(c, c.rank)), ep_flag(op.epoch(), p.sent, u32(t) + 1));
    }
  }
}

bool receive_routing(const EpDispatchParams& p, const EpOperation& op, const EpHandle& handle) {
  const EpCommon& c = p.c;
  for (int s = 0; s < c.shape.num_ranks; ++s) {
    if (s == c.rank) continue;
    if (!op.wait(kEpPhaseRouting, s, op.word(c.rank, c.layout.route_flags, s), ep_flag(op.epoch(), kEpRouting, 1)))
      return false;
    u64 header = 0;
    std::memcpy(&header, op.buffer(c.rank, c.layout.headers) + s * 8, sizeof(header));
    if (ep_flag_format(header) != p.sent)
      return op.fail(kEpMismatch, kEpPhaseRouting, s, ep_flag(op.epoch(), p.sent, 0), header);
    handle.num_tokens(s) = int(ep_flag_count(header));
    const i64 bytes = i64(handle.num_tokens(s)) * c.shape.topk * 4;
    std::memcpy(handle.weights(s, 0), op.buffer(c.rank, c.layout.weights) + handle.choice(s, 0) * 4, bytes);
  }
  return true;
}

/// Rows in order of (expert, source, token).
void assign_rows(const EpDispatchParams& p, const EpOperation& op, const EpHandle& handle) {
  const EpCommon& c = p.c;
  const int first = c.first_expert[c.rank], num_local = ep_num_local_experts(c);
  const auto for_each_choice = [&](auto&& f) {
    for (int s = 0; s < c.shape.num_ranks; ++s) {
      const int* theirs = reinterpret_cast<int*>(op.buffer(c.rank, c.layout.choices)) + handle.choice(s, 0);
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
    handle.offsets()[e + 1] = handle.offsets()[e] + p.alignment.up(handle.counts()[e]) * p.alignment.value;
  std::vector<int> next(handle.offsets(), handle.offsets() + num_local);
  for_each_choice([&](int expert, int& row) {
    if (expert < 0 || expert >= num_local) {
      row = kEpNotHere;
    } else {
      row = next[expert]++;
    }
  });
}

void write_padding(const EpDispatchParams& p, const EpHandle& handle) {
  const int hidden = p.c.shape.hidden;
  for (int e = 0; e < ep_num_local_experts(p.c); ++e) {
    const int end = std::min(handle.offsets()[e + 1], p.capacity);
    for (i64 row = handle.offsets()[e] + handle.counts()[e]; row < end; ++row) {
      const i64 size = element_size(p.format);
      std::memset(static_cast<u8*>(p.rows) + row * p.row_stride * size, 0, hidden * size);
      for (int b = 0; p.row_scales && b < ep_num_blocks(hidden); ++b) p.row_scales[row + b * p.row_scale_stride] = 1;
      if (p.row_weights) p.row_weights[row] = 0;
    }
  }
}

bool receive_tokens(const EpDispatchParams& p, const EpOperation& op, const EpHandle& handle, const Source& mine) {
  const EpCommon& c = p.c;
  const int hidden = c.shape.hidden, blocks = ep_num_blocks(hidden);
  const i64 size = element_size(p.format);
  for (int s = 0; s < c.shape.num_ranks; ++s) {
    for (i64 t = 0; t < handle.num_tokens(s); ++t) {
      if (!handle.is_here(s, t)) continue;
      const u8* slot = nullptr;
      if (s != c.rank) {
        if (!op.wait(kEpPhaseTokens, s, op.word(c.rank, c.layout.token_flags, token_flag_idx(c, s)),
                     ep_flag(op.epoch(), p.sent, u32(t) + 1)))
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

bool dispatch_receive(const EpDispatchParams& p, const EpHandle& handle, const Source& mine) {
  const EpCommon& c = p.c;
  EpOperation op(c, kEpDispatchRecv);
  if (p.route) {
    if (!receive_routing(p, op, handle)) return false;
    assign_rows(p, op, handle);
  }
  const int num_local = ep_num_local_experts(c);
  if (p.offsets) std::copy_n(handle.offsets(), num_local + 1, p.offsets);
  if (p.counts) std::copy_n(handle.counts(), num_local, p.counts);
  if (p.copy) {
    if (const int needed = handle.offsets()[num_local]; needed > p.capacity) {
      c.status->rows_given = p.capacity;
      c.status->rows_needed = needed;
    }
    write_padding(p, handle);
    if (!receive_tokens(p, op, handle, mine)) return false;
  }
  op.give_credits(c.layout.dispatch_credit);
  op.finish();
  return true;
}

}  // namespace

void ep_dispatch(const EpDispatchParams& p) {
  if (const EpStandIn* other = ep_stand_in) return other->dispatch(p);
  const EpHandle handle(p.c);
  if (!p.route) handle.check_tokens("dispatch: x");
  const Source source(p);  // once, for the peers and for this rank's own experts
  if (p.c.send) {
    EpOperation op(p.c, kEpDispatchSend);
    if (p.c.recv && !op.follows(kEpDispatchRecv, kEpPhaseTokens)) return;
    if (!op.wait_for_credits(kEpPhaseDispatchCredit, p.c.layout.dispatch_credit)) return;
    if (p.route) {
      keep_routing(p, handle);
      send_routing(p, op, handle);
    }
    if (p.copy) send_tokens(p, op, handle, source);
    op.finish();
  }
  if (p.c.recv) dispatch_receive(p, handle, source);
}

}  // namespace phalanx::cpu
