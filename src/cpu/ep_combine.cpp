#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/convert.h"
#include "cpu/ep_protocol.h"
#include "cpu/fma.h"
#include "cpu/parallel.h"

namespace phalanx::cpu {
namespace {

u8* sum_slot(const EpOperation& op, const EpCommon& c, int at, int source, i64 token) {
  return ep_slot(op, c, at, source, token, c.layout.sums, c.layout.sum_slot);
}

PHALANX_FMA_CLONES
void add_row(const Bf16* row, float weight, float* sum, int count) {
  for (int i = 0; i < count; ++i) sum[i] = __builtin_fmaf(weight, std::bit_cast<float>(u32(row[i].bits) << 16), sum[i]);
}

/// What this rank's experts made of a token, and the values of its rows.
void sum_rows(const EpCombineParams& p, const EpHandle& handle, int source, i64 token, float* sum, float* values) {
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

void send_sums(const EpCombineParams& p, const EpOperation& op, const EpHandle& handle) {
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
      op.signal(op.word(s, c.layout.sum_flags, c.rank), ep_flag(op.epoch(), sums_format(p), u32(t) + 1));
    }
  }
}

bool receive_sums(const EpCombineParams& p, const EpOperation& op, const EpHandle& handle) {
  const EpCommon& c = p.c;
  const int hidden = c.shape.hidden, topk = c.shape.topk;
  std::vector<float> total(hidden), sum(hidden), values(topk);
  for (i64 t = 0; t < c.num_tokens; ++t) {
    const Bf16* residual = static_cast<const Bf16*>(p.residual) + t * p.residual_stride;
    for (int i = 0; i < hidden; ++i) total[i] = 0.0f;
    if (p.values) std::fill_n(p.topk_values + t * topk, topk, 0.0f);
    for (int turn = 0; turn < c.shape.num_ranks; ++turn) {
      const int r = turn == 0 ? c.rank : turn - (turn <= c.rank);  // this one, then the others in order
      if (!handle.goes_to(r, t)) continue;
      if (r == c.rank) {
        sum_rows(p, handle, r, t, sum.data(), values.data());
        for (int i = 0; i < hidden; ++i) total[i] += sum[i];
      } else {
        if (!op.wait(kEpPhaseSums, r, op.word(c.rank, c.layout.sum_flags, r),
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

void ep_combine(const EpCombineParams& p) {
  if (const EpStandIn* other = ep_stand_in) return other->combine(p);
  const DefaultFloatEnvironment environment;
  const EpHandle handle(p.c);
  handle.check_tokens("combine: out");
  if (p.c.send) {
    EpOperation op(p.c, kEpCombineSend);
    if (p.c.recv && !op.follows(kEpCombineRecv, kEpPhaseSums)) return;
    if (!op.wait_for_credits(kEpPhaseCombineCredit, p.c.layout.combine_credit)) return;
    send_sums(p, op, handle);
    op.finish();
  }
  if (p.c.recv) {
    EpOperation op(p.c, kEpCombineRecv);
    if (!receive_sums(p, op, handle)) return;
    op.give_credits(p.c.layout.combine_credit);
    op.finish();
  }
}

}  // namespace phalanx::cpu
