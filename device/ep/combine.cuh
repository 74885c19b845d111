// Combine: the rows of a token's experts, weighted and summed where they are, come home once a rank and are summed
// there.
//
//   sum_r[t] = bf16(sum over choices k of rank r, in order, of weight[t, k] * rows_r[row(t, k)])
//   out[t]   = bf16(sum of this rank, then over the others r in order of sum_r[t], then + residual[t])
//
// in FP32, by FMA; a rank's sum for its own tokens is not rounded.
//
//   listing warps     which rows come, and what is to be done with them: those of others' tokens; a few tokens later those
//                     of this rank's, and slots behind their flags
//   loading warps     listed rows --TMA--> a ring of stages, a row each
//   summing warps     stages --> sums in registers --> the home's slots, or out
//   signalling warp   sums sent --> sum flags, one a CTA
//   at the end        all read --> credits
//
// Where tokens are few, summing warps read slots as they come, and flags say at the beginning what will.
//
// Sums are sent token by token, to all ranks in turn, so that each home can begin early. A CTA's two halves go their
// own ways. Who lists is some sums ahead of who loads, who has so little to do that no stage stays empty.
#pragma once
#include "device/ep/combine_units.cuh"

namespace phalanx {

__device__ __forceinline__ EpFormat ep_sums_format(const EpCombineParams& p) {
  return p.values ? kEpSumsAndValues : kEpSums;
}

// The slot for the sum of source's token, in this operation's buffer of rank `at`; it comes from rank `from`.
__device__ __forceinline__ u8* ep_sum_slot(const EpOperation& op, int at, int from, i64 token) {
  const EpCommon& c = op.c;
  return op.buffer(at, c.layout.sums) + (i64(ep_peer_idx(at, from)) * c.shape.max_tokens + token) * c.layout.sum_slot;
}
// This lane's choice's value in it.
__device__ __forceinline__ u32* ep_value_word(u8* slot, int hidden) {
  return reinterpret_cast<u32*>(slot + ep_bf16_bytes(hidden)) + threadIdx.x % 32;
}
__device__ __forceinline__ u64* ep_sum_flag(const EpOperation& op, int at, int from, int half) {
  const EpShape& shape = op.c.shape;
  const int cta = from * shape.num_ctas + int(blockIdx.x);
  return op.word(at, op.c.layout.sum_flags, cta * kEpHalves + (ep_sums_are_few(shape) ? 0 : half));
}

// The homes have read what this CTA will write over: with other numbers of tokens any of their CTAs may be the one that
// does. With two buffers a credit comes from the kernel after that, before which all of them have.
__device__ __forceinline__ bool ep_may_send_sums(const EpOperation& op) {
  const bool by_each = op.c.shape.num_buffers == 1;
  const Divisor ctas = by_each ? op.c.by.ctas : Divisor(1);
  return __all_sync(0xffffffffu, ep_wait_for_credits(op, kEpPhaseCombineCredit, op.c.layout.combine_credit,
                                                     by_each ? 0 : int(blockIdx.x), ctas, threadIdx.x % 32, 32));
}

// --- listing --------------------------------------------------------------------------------------------------------

// How many tokens' sums each peer has sent as far as is known, one a lane (of ranks above 31 nothing is).
struct EpNews {
  int half;
  u32 count = 0;

  // Until the peers in `ranks` have sent their sums of this rank's token number i of this half. By a warp.
  __device__ __forceinline__ bool wait(const EpCombineParams& p, const EpOperation& op, u64 ranks, u32 i) {
    const EpCommon& c = p.c;
    const int lane = threadIdx.x % 32;
    if (__all_sync(0xffffffffu, ranks >> 32 == 0 && (!(ranks >> lane & 1) || count > i))) return true;
    bool fine = true;
#pragma unroll 1
    for (int r = lane; r < c.shape.num_ranks; r += 32) {
      if (!(ranks >> r & 1)) continue;
      const u64* flag = ep_sum_flag(op, c.rank, r, half);
      const u64 wanted = ep_flag(op.epoch, ep_sums_format(p), i + 1), seen = ptx::load_acquire_sys(flag);
      const bool is_here = seen >= wanted && seen >> 24 == wanted >> 24;
      if (r == lane) count = is_here ? ep_flag_count(seen) : i + 1;
      fine = fine && (is_here || ep_wait(c, kEpPhaseSums, r, flag, wanted));
    }
    __syncwarp();
    ptx::fence_proxy_async_global();  // stored by others' threads, loaded by TMA
    return __all_sync(0xffffffffu, fine);
  }
};

// Lane k: what the rank that holds its choice says of its row. False if that did not come.
template <bool kFew>
__device__ __forceinline__ bool ep_write_values(const EpCombineParams& p, const EpOperation& op, const EpWork& work) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  bool fine = true;
  if (lane < c.shape.topk) {
    const int r = work.expert < 0 ? -1 : ep_rank_of(c.first_expert, c.shape.num_ranks, work.expert);
    float value = 0;
    if (r == c.rank) value = ep_row_value(p, work.terms);
    if (r >= 0 && r != c.rank) {
      u32* word = ep_value_word(ep_sum_slot(op, c.rank, r, work.token), c.shape.hidden);
      u32 bits = ptx::load_relaxed_sys(word);
      if (kFew) {
        EpPatience patience(c, kEpPhaseSums, r, ep_flag(op.epoch, kEpSumsAndValues, 1));
#pragma unroll 1
        for (; bits == kEpNothing && fine; bits = ptx::load_relaxed_sys(word)) fine = patience.lasts(bits);
        *word = kEpNothing;
      }
      value = __uint_as_float(bits);
    }
    p.topk_values[work.token * c.shape.topk + lane] = value;
  }
  return __all_sync(0xffffffffu, fine);
}

// A sum to be listed.
template <bool kFew>
struct EpJob {
  bool is_there, is_home;
  u32 rows;       // lanes
  const u8* row;  // this lane's
  float weight;
  u64 others = 0;  // home: ranks whose sums are added
  i64 token;
  EpRange bytes;
  EpTodo sum;

  __device__ __forceinline__ EpJob(const EpCombineParams& p, const EpOperation& send, const EpOperation& recv,
                                   const EpWork& work, EpRange columns, int steps)
      : is_home(work.source == p.c.rank), token(work.token), bytes(columns) {
    const EpCommon& c = p.c;
    const u8* residual = static_cast<const u8*>(p.residual);
    rows = __ballot_sync(0xffffffffu, work.terms.has_row(p));
    is_there =
        work.source >= 0 && (is_home || __any_sync(0xffffffffu, work.terms.row != kEpNotHere));  // who would look?
    if (!is_there) return;
    row = static_cast<const u8*>(p.rows) + i64(work.terms.row) * p.row_stride * 2 + bytes.begin;
    weight = work.terms.weight;
    sum = {nullptr, nullptr, 0, __popc(rows), steps, 0};
    if (!is_home) {
      sum.out = ep_sum_slot(send, work.source, c.rank, token) + bytes.begin;
      return;
    }
    others = ep_ranks_of(c, work.expert) & ~(u64(1) << c.rank);
    sum.out = static_cast<u8*>(p.out) + token * p.out_stride * 2 + bytes.begin;
    if (residual) sum.residual = residual + token * p.residual_stride * 2 + bytes.begin;
    sum.slots = ep_sum_slot(recv, c.rank, c.rank == 0 ? 1 : 0, token) + bytes.begin;
    if (kFew)
      sum.others = others;
    else
      sum.terms += __popcll(others);
  }

  // To the next columns, if a stage has no room for all.
  __device__ __forceinline__ void advance() {
    row += kEpStageBytes<kFew>;
    sum.out += kEpStageBytes<kFew>;
    sum.slots += kEpStageBytes<kFew>;
    if (sum.residual) sum.residual += kEpStageBytes<kFew>;
  }
};

// Lists it. Of a token of this rank, `number` in this half: its own rows first, which need no waiting, then the other
// ranks' sums.
template <bool kFew>
__device__ __forceinline__ bool ep_list(const EpCombineParams& p, const EpOperation& recv, EpLister& lister,
                                        EpNews& news, EpJob<kFew>& job, int number) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  const bool adds_slots = !kFew && job.others != 0;
  // Whoever waits for what this rank has sent must not have to wait for what it waits for.
  if (adds_slots && job.rows == 0) lister.push_nothing({nullptr, nullptr, 0, 0, job.sum.steps, 0});
#pragma unroll 1
  for (int begin = job.bytes.begin; begin < job.bytes.end; begin += kEpStageBytes<kFew>, job.advance()) {
    job.sum.bytes = min_of(job.bytes.end - begin, kEpStageBytes<kFew>);
    if (job.sum.terms == 0) lister.push_nothing(job.sum);
    lister.push(job.rows, {job.row, job.sum.bytes, job.weight}, job.sum, true);
    if (!adds_slots) continue;
    if (begin == job.bytes.begin && !news.wait(p, recv, job.others, u32(number))) {
      // What has been said to come must come, be it anything.
#pragma unroll 1
      for (int i = 0; job.rows != 0 && i < __popcll(job.others); ++i) lister.push(1, {nullptr, 0, 0}, job.sum, false);
      return false;
    }
#pragma unroll 1
    for (int r = 0; r < c.shape.num_ranks; r += 32) {
      const u32 now = u32(job.others >> r);
      const u8* slot = now >> lane & 1 ? ep_sum_slot(recv, c.rank, r + lane, job.token) + begin : nullptr;
      lister.push(now, {slot, job.sum.bytes, 1}, job.sum, job.rows == 0 && (r == 0 || u32(job.others) == 0));
    }
  }
  return !kFew || !job.is_home || news.wait(p, recv, job.others, u32(number));
}

// By a listing warp. False if a wait has failed.
template <bool kFew>
__device__ __forceinline__ bool ep_list_all(const EpCombineParams& p, const EpOperation& send, const EpOperation& recv,
                                            EpCombineHalf& smem, int half) {
  const EpCommon& c = p.c;
  const EpRange bytes = ep_bytes_of_half(c.shape, half);
  EpLister lister{smem};
  EpUnit unit(p, smem.tokens);
  EpOutlook outlook(p, smem, unit);
  EpNews news{half};
  bool fine = !c.send || ep_may_send_sums(send);
#pragma unroll 1
  while (fine && !unit.is_over()) {
    const EpWork present = outlook.take(unit);
    const bool is_home = unit.is_home(c.shape.num_ranks);
    const int number = unit.token(), steps = min_of(unit.step + is_home, unit.sends);
    unit.next(c.shape.num_ranks);
    EpJob<kFew> job(p, send, recv, present, bytes, steps);
    if (!job.is_there) continue;
    fine = ep_list<kFew>(p, recv, lister, news, job, number);
    if (fine && is_home && p.values && bytes.begin == 0) fine = ep_write_values<kFew>(p, recv, present);
  }
  lister.push_nothing({nullptr, nullptr, 0, 0, fine ? unit.sends : 0, 1});
  return fine;
}

// --- signalling -----------------------------------------------------------------------------------------------------

// Values of the rows of every source's tokens of these steps, into the sums' slots.
__device__ __forceinline__ void ep_send_values(const EpCombineParams& p, const EpOperation& op, const EpRange* tokens,
                                               int begin, int end) {
  const EpCommon& c = p.c;
#pragma unroll 1
  for (int s = 0; s < c.shape.num_ranks; ++s) {
#pragma unroll 1
    for (int i = begin; s != c.rank && i < min_of(end, tokens[s].size()); ++i) {
      const i64 token = tokens[s].begin + i;
      const EpTerms terms = ep_terms(p, s, token);
      if (terms.row != kEpNotHere)
        ptx::store_relaxed_sys(ep_value_word(ep_sum_slot(op, s, c.rank, token), c.shape.hidden),
                               ep_something(__float_as_uint(ep_row_value(p, terms))));
    }
  }
}

// Few tokens: what will come, before it does; and values.
__device__ __forceinline__ bool ep_announce_sums(const EpCombineParams& p, const EpOperation& op, EpCombineSmem& smem) {
  const EpCommon& c = p.c;
  const EpRange* tokens = smem.halves[0].tokens;
  const int sends = EpUnit(p, tokens).sends;
  if (sends == 0) return true;
  if (!ep_may_send_sums(op)) return false;
#pragma unroll 1
  for (int r = threadIdx.x % 32; r < c.shape.num_ranks; r += 32)
    if (r != c.rank) ptx::store_relaxed_sys(ep_sum_flag(op, r, c.rank, 0), ep_flag(op.epoch, ep_sums_format(p), sends));
  if (p.values) ep_send_values(p, op, tokens, 0, sends);
  return true;
}

// Many: tells every home how many tokens' sums of each half have been sent, as many as all summing warps have stored.
__device__ __forceinline__ void ep_signal_sums(const EpCombineParams& p, const EpOperation& op, EpCombineSmem& smem) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  int told[kEpHalves] = {}, left = 0;
#pragma unroll
  for (int h = 0; h < kEpHalves; ++h) left += EpUnit(p, smem.halves[h].tokens).sends;
#pragma unroll 1
  while (left > 0 && ep_look(smem.failed) == 0) {
    ptx::nanosleep(50);
#pragma unroll
    for (int h = 0; h < kEpHalves; ++h) {
      const bool counts = lane < kEpHalves * kEpSumWarps && lane / kEpSumWarps == h;
      const int stored = int(__reduce_min_sync(0xffffffffu, counts ? u32(atomicOr(&smem.steps[lane], 0)) : ~0u));
      if (stored == told[h]) continue;
      ptx::fence_acq_rel_cta();
      if (p.values) ep_send_values(p, op, smem.halves[h].tokens, told[h], stored);
      left -= stored - told[h];
      told[h] = stored;
      __syncwarp();
#pragma unroll 1
      for (int r = lane; r < c.shape.num_ranks; r += 32)
        if (r != c.rank)
          ptx::store_release_sys(ep_sum_flag(op, r, c.rank, h), ep_flag(op.epoch, ep_sums_format(p), stored));
    }
  }
}

// kFew: what the shape says.
template <bool kFew>
__device__ __forceinline__ void ep_combine(const EpCombineParams& p) {
  extern __shared__ __align__(128) u8 smem_base[];
  EpCombineSmem& smem = *reinterpret_cast<EpCombineSmem*>(smem_base);
  const EpCommon& c = p.c;
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) {  // not by one thread: there are many
    if (warp == 0) smem.failed = 0;
    for (EpCombineHalf& half : smem.halves) {
#pragma unroll 1
      for (int i = warp; i < kEpListed; i += kEpCombineWarps) {
        ptx::mbarrier_init(&half.listed[i], 1);
        ptx::mbarrier_init(&half.free[i], 1);
        if (i >= kEpStages) continue;
        ptx::mbarrier_init(&half.full[i], 1);
        ptx::mbarrier_init(&half.empty[i], 32 * kEpSumWarps);
      }
    }
    ptx::fence_mbarrier_init();
  }
  ptx::grid_wait_dependencies();
  if (!ep_fits_handle(c, kEpPhaseSums)) return;
  if (int(threadIdx.x) < kEpHalves * kEpSumWarps) smem.steps[threadIdx.x] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < kEpHalves * c.shape.num_ranks; i += 32 * kEpCombineWarps) {
    const int r = i / kEpHalves, h = i % kEpHalves;
    const int count = r == c.rank ? c.num_tokens : c.handle[c.handle_layout.num_tokens + r];
    smem.halves[h].tokens[r] = ep_tokens_of_half(c.shape, count, blockIdx.x, c.by.ctas, h);
  }
  const EpOperation send(c, kEpCombineSend), recv(c, kEpCombineRecv);
  const u64 who = threadIdx.x == 0 ? ep_stop_word(c) : 0;
  if (threadIdx.x == 0) smem.expected = ep_flag(recv.epoch, ep_sums_format(p), 1);
  const bool may = threadIdx.x != 0 || ep_may_begin(send, recv, kEpPhaseSums, c.recv, who);
  if (!ptx::named_barrier_all(0, 32 * kEpCombineWarps, may)) return;
  if (warp < kEpHalves * kEpSumWarps) {
    ep_sum_stages<kFew>(c, smem);
  } else if (warp < kEpHalves * (kEpSumWarps + 1)) {
    const int half = warp % kEpHalves;
    if (!ep_list_all<kFew>(p, send, recv, smem.halves[half], half)) *static_cast<volatile int*>(&smem.failed) = 1;
  } else if (warp < kEpHalves * (kEpSumWarps + 2)) {
    if (threadIdx.x % 32 == 0) ep_load_listed(smem.halves[warp % kEpHalves]);
    __syncwarp();
  } else {
    ep_give_late_credits(recv, c.layout.combine_credit);
    if constexpr (!kFew) {
      if (c.send) ep_signal_sums(p, send, smem);
    } else if (c.send && !ep_announce_sums(p, send, smem)) {
      *static_cast<volatile int*>(&smem.failed) = 1;
    }
  }
  __syncthreads();
  ptx::grid_launch_dependents();  // not before: ranks may share a GPU, and what waits for a peer must not be in its way
  if (ep_look(smem.failed) != 0) return;
  if (c.send) ep_finish_send(send);
  if (c.recv) ep_finish_recv(recv, c.layout.combine_credit);
}

}  // namespace phalanx
