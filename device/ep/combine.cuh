// Combine: the rows of a token's experts, weighted and summed where they are, come home once a rank and are summed
// there.
//
//   sum_r[t] = bf16(sum over choices k of rank r, in order, of weight[t, k] * rows_r[row(t, k)])
//   out[t]   = bf16(sum over ranks r in order of sum_r[t], then + residual[t])
//
// in FP32, by FMA; a rank's sum for its own tokens is not rounded.
//
//   loading warp      rows of others' tokens; a few tokens later those of this rank's, and slots behind their flags
//                     --TMA--> a ring of stages, a row each, with what is to be done with it
//   summing warps     stages --> sums in registers --> the home's slots, or out
//   signalling warp   sums sent --> sum flags, one a CTA
//   at the end        all read --> credits
//
// The tokens of a CTA are those of its dispatch, and so are the slots' numbers. Sums are sent token by token, to all
// ranks in turn, so that each home can begin early.
#pragma once
#include "device/ep/signal.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/tma.cuh"

namespace phalanx {

// Eight neighbouring columns.
struct EpSum {
  float v[8];

  __device__ __forceinline__ void add(const EpVector& x, float weight) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = __fmaf_rn(weight, ptx::bf16_lo(x.word[i]), v[2 * i]);
      v[2 * i + 1] = __fmaf_rn(weight, ptx::bf16_hi(x.word[i]), v[2 * i + 1]);
    }
  }
  __device__ __forceinline__ EpVector to_bf16() const {
    EpVector packed;
#pragma unroll
    for (int i = 0; i < 4; ++i) packed.word[i] = ptx::pack_bf16(v[2 * i], v[2 * i + 1]);
    return packed;
  }
};

// A token's rows on this rank: lane k has row and weight of choice k.
struct EpTerms {
  int row = kEpNotHere;
  float weight = 1;

  __device__ __forceinline__ bool has_row(const EpCombineParams& p) const { return row >= 0 && row < p.capacity; }
};

__device__ __forceinline__ EpTerms ep_terms(const EpCombineParams& p, int source, i64 token) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  EpTerms terms;
  if (lane >= c.shape.topk) return terms;
  const i64 choice = ep_choice(c, source, token) + lane;
  terms.row = c.handle[c.handle_layout.rows + choice];
  if (p.weighted) terms.weight = reinterpret_cast<const float*>(c.handle + c.handle_layout.weights)[choice];
  return terms;
}

// The value of the row in this lane.
__device__ __forceinline__ float ep_row_value(const EpCombineParams& p, const EpTerms& terms) {
  return terms.has_row(p) ? p.row_values[terms.row] : 0.0f;
}

__device__ __forceinline__ EpFormat ep_sums_format(const EpCombineParams& p) {
  return p.values ? kEpSumsAndValues : kEpSums;
}

// The slot for the sum of source's token, in this operation's buffer of rank `at`; it comes from rank `from`.
__device__ __forceinline__ u8* ep_sum_slot(const EpOperation& op, int at, int from, i64 token) {
  const EpCommon& c = op.c;
  return op.buffer(at, c.layout.sums) + (i64(ep_peer_idx(at, from)) * c.shape.max_tokens + token) * c.layout.sum_slot;
}
__device__ __forceinline__ u64* ep_sum_flag(const EpOperation& op, int at, int from) {
  return op.word(at, op.c.layout.sum_flags, from * op.c.shape.num_ctas + int(blockIdx.x));
}

// --- the ring -------------------------------------------------------------------------------------------------------

// What is to be done with a stage, in this order.
constexpr u32 kEpBegin = 1;     // a new sum
constexpr u32 kEpAdd = 2;       // + weight * row
constexpr u32 kEpStash = 4;     // this rank's own sum waits
constexpr u32 kEpAddStash = 8;  // and is added
constexpr u32 kEpEnd = 16;      // store it
constexpr u32 kEpStep = 32;     // all sums of one more token of each source have been stored
constexpr u32 kEpStop = 64;
struct alignas(16) EpStage {
  u8* out;
  const u8* residual;
  u32 tasks;
  int bytes;  // of the columns
  float weight;
};

struct EpCombineSmem {
  u8 rows[kEpStages][kEpStageBytes];
  EpStage stage[kEpStages];
  u64 full[kEpStages], empty[kEpStages];
  int steps[32];  // finished by each summing warp
  EpRange tokens[kEpMaxRanks];
  int failed;
};

static_assert(sizeof(EpCombineSmem) <= kEpCombineSmemBytes);

// The loading warp's side.
struct EpFeeder {
  EpCombineSmem& smem;
  int count = 0;  // stages

  // All lanes have the same arguments. `row`: null if there is nothing to add.
  __device__ __forceinline__ void push(const EpStage& stage, const u8* row) {
    const int s = count % kEpStages, round = count / kEpStages;
    ++count;
    if (threadIdx.x % 32 != 0) return;
    if (round > 0) ptx::mbarrier_wait(&smem.empty[s], (round - 1) % 2);
    smem.stage[s] = stage;
    if (row) {
      ptx::mbarrier_arrive_expect_tx(&smem.full[s], u32(stage.bytes));
      ptx::bulk_load(smem.rows[s], row, u32(stage.bytes), &smem.full[s]);
    } else {
      ptx::mbarrier_arrive(&smem.full[s]);
    }
  }
};

// --- loading --------------------------------------------------------------------------------------------------------

// Sends token by token, to each rank in turn; this rank's own tokens so many behind, as others' sums take a while to come.
constexpr int kEpLag = 8;

// A sum to be made, in the order in which they are: of token `step` of each source's, then of a token of this rank.
struct EpUnit {
  int step = 0, turn = 1;  // turns 1 to R - 1: other ranks'; R: this rank's, and then the step ends
  int sends, homes, lag;

  __device__ __forceinline__ EpUnit(const EpCombineParams& p, const EpRange* tokens)
      : sends(0), homes(p.c.recv ? tokens[p.c.rank].size() : 0) {
#pragma unroll 1
    for (int r = 0; p.c.send && r < p.c.shape.num_ranks; ++r)
      if (r != p.c.rank) sends = sends > tokens[r].size() ? sends : tokens[r].size();
    lag = min_of(sends, kEpLag);
  }
  __device__ __forceinline__ bool is_over() const { return step >= sends && step - lag >= homes; }
  __device__ __forceinline__ bool is_home(int num_ranks) const { return turn == num_ranks; }
  __device__ __forceinline__ int token() const { return step - lag; }  // of this rank's, if it is home's turn
  __device__ __forceinline__ void next(int num_ranks) {
    turn = turn == num_ranks ? 1 : turn + 1;
    if (turn == 1) ++step;
  }
};

// One unit's terms, asked for while the one before is loaded.
struct EpWork {
  int source = -1;  // none
  i64 token;
  EpTerms terms;
  int expert = -1;  // home: one a lane

  __device__ __forceinline__ EpWork(const EpCombineParams& p, const EpUnit& unit, const EpRange* tokens) {
    const EpCommon& c = p.c;
    const int num_ranks = c.shape.num_ranks, lane = threadIdx.x % 32;
    if (unit.is_over()) return;
    const bool is_home = unit.is_home(num_ranks);
    const int s = is_home ? c.rank : (c.rank + unit.turn) % num_ranks, i = is_home ? unit.token() : unit.step;
    if (is_home ? i < 0 || i >= unit.homes : i >= unit.sends || i >= tokens[s].size()) return;
    source = s;
    token = tokens[s].begin + i;
    terms = ep_terms(p, s, token);
    if (is_home && lane < c.shape.topk) expert = c.handle[c.handle_layout.experts + token * c.shape.topk + lane];
  }
};

// Columns [begin, begin + bytes) of a token's rows on this rank; `stage` is what to do with them, and the last one's too.
__device__ __forceinline__ void ep_load_rows(const EpCombineParams& p, EpFeeder& feeder, const EpTerms& terms, u32 rows,
                                             i64 begin, EpStage& stage, u32 last) {
#pragma unroll 1
  for (u32 left = rows; left != 0;) {
    const int k = ep_pop(left);
    const i64 row = __shfl_sync(0xffffffffu, terms.row, k);
    stage.weight = __shfl_sync(0xffffffffu, terms.weight, k);
    stage.tasks |= kEpAdd | (left == 0 ? last : 0);
    feeder.push(stage, static_cast<const u8*>(p.rows) + row * p.row_stride * 2 + begin);
    stage.tasks = 0;
  }
}

// Until the peers in `ranks` have sent their sums of this rank's token number i of this CTA. By a warp.
__device__ __forceinline__ bool ep_wait_for_sums(const EpCombineParams& p, const EpOperation& op, u64 ranks, int i) {
  const EpCommon& c = p.c;
  bool fine = true;
#pragma unroll 1
  for (int r = threadIdx.x % 32; r < c.shape.num_ranks; r += 32) {
    if (ranks >> r & 1)
      fine =
          fine && ep_wait(c, kEpPhaseSums, r, ep_sum_flag(op, c.rank, r), ep_flag(op.epoch, ep_sums_format(p), i + 1));
  }
  __syncwarp();
  ptx::fence_proxy_async_global();  // stored by others' threads, loaded by TMA
  return __all_sync(0xffffffffu, fine);
}

// Lane k: what the rank that holds its choice says of its row.
__device__ __forceinline__ void ep_write_values(const EpCombineParams& p, const EpOperation& op, const EpWork& work) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
  if (lane >= c.shape.topk) return;
  const int r = work.expert < 0 ? -1 : ep_rank_of(c.first_expert, c.shape.num_ranks, work.expert);
  float value = 0;
  if (r == c.rank) value = ep_row_value(p, work.terms);
  if (r >= 0 && r != c.rank)
    value =
        reinterpret_cast<const float*>(ep_sum_slot(op, c.rank, r, work.token) + ep_bf16_bytes(c.shape.hidden))[lane];
  p.topk_values[work.token * c.shape.topk + lane] = value;
}

// A sum of this rank's rows to its slot at the token's home.
__device__ __forceinline__ void ep_load_send(const EpCombineParams& p, const EpOperation& op, EpFeeder& feeder,
                                             const EpWork& work) {
  const int row_bytes = 2 * p.c.shape.hidden;
  const u32 rows = __ballot_sync(0xffffffffu, work.terms.has_row(p));
  if (!__any_sync(0xffffffffu, work.terms.row != kEpNotHere)) return;  // nobody will look
  u8* slot = ep_sum_slot(op, work.source, p.c.rank, work.token);
#pragma unroll 1
  for (int begin = 0; begin < row_bytes; begin += kEpStageBytes) {
    EpStage stage{slot + begin, nullptr, kEpBegin, min_of(row_bytes - begin, kEpStageBytes), 0};
    ep_load_rows(p, feeder, work.terms, rows, begin, stage, kEpEnd);
    if (rows != 0) continue;
    stage.tasks |= kEpEnd;
    feeder.push(stage, nullptr);
  }
}

// The sum of a token of this rank: its own rows first, which need no waiting, then the other ranks' sums.
__device__ __forceinline__ bool ep_load_home(const EpCombineParams& p, const EpOperation& op, EpFeeder& feeder,
                                             const EpWork& work, int number) {
  const EpCommon& c = p.c;
  const int row_bytes = 2 * c.shape.hidden;
  const u32 rows = __ballot_sync(0xffffffffu, work.terms.has_row(p));
  const u64 me = u64(1) << c.rank, ranks = ep_ranks_of(c, work.expert), others = ranks & ~me,
            before = others & (me - 1);
  const u8* residual = static_cast<const u8*>(p.residual);
#pragma unroll 1
  for (int begin = 0; begin < row_bytes; begin += kEpStageBytes) {
    EpStage stage{static_cast<u8*>(p.out) + work.token * p.out_stride * 2 + begin,
                  residual ? residual + work.token * p.residual_stride * 2 + begin : nullptr, kEpBegin,
                  min_of(row_bytes - begin, kEpStageBytes), 1};
    ep_load_rows(p, feeder, work.terms, rows, begin, stage,
                 kEpStash | (before == 0 ? kEpAddStash : 0) | (others == 0 ? kEpEnd : 0));
    if (begin == 0 && !ep_wait_for_sums(p, op, others, number)) return false;
    stage.weight = 1;
#pragma unroll 1
    for (u64 left = others; left != 0;) {
      const int r = ep_pop(left);
      const bool is_turn = rows != 0 && (before >> r & 1) && (before >> r) == 1;  // the last one before this rank
      stage.tasks |= kEpAdd | (is_turn ? kEpAddStash : 0) | (left == 0 ? kEpEnd : 0);
      feeder.push(stage, ep_sum_slot(op, c.rank, r, work.token) + begin);
      stage.tasks = 0;
    }
    if (rows != 0 || others != 0) continue;
    stage.tasks |= kEpEnd;
    feeder.push(stage, nullptr);
  }
  if (p.values) ep_write_values(p, op, work);
  return true;
}

__device__ __forceinline__ bool ep_load_all(const EpCombineParams& p, const EpOperation& send, const EpOperation& recv,
                                            EpFeeder& feeder) {
  const EpCommon& c = p.c;
  const EpRange* tokens = feeder.smem.tokens;
  const int num_ranks = c.shape.num_ranks, lane = threadIdx.x % 32;
  EpUnit unit(p, tokens);
  EpWork work(p, unit, tokens);
  if (c.send) {
    const EpRange mine{int(blockIdx.x), int(blockIdx.x) + 1};
    const bool fine = ep_wait_for_credits(send, kEpPhaseCombineCredit, c.layout.combine_credit, mine, lane, 32);
    if (!__all_sync(0xffffffffu, fine)) return false;
  }
#pragma unroll 1
  while (!unit.is_over()) {
    const EpWork present = work;
    const bool is_home = unit.is_home(num_ranks), ends_step = is_home && unit.step < unit.sends;
    const int number = unit.token();
    unit.next(num_ranks);
    work = EpWork(p, unit, tokens);
    if (ends_step) feeder.push({nullptr, nullptr, kEpStep, 0, 0}, nullptr);
    if (present.source < 0) continue;
    if (!is_home) {
      ep_load_send(p, send, feeder, present);
    } else if (!ep_load_home(p, recv, feeder, present, number)) {
      return false;
    }
  }
  return true;
}

// --- summing --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void ep_sum_stages(EpCombineSmem& smem) {
  const int warp = int(threadIdx.x) / 32, lane = threadIdx.x % 32, first = int(threadIdx.x) * 16;
  constexpr int kPitch = kEpSumWarps * kEpPitch;
  EpSum sum[kEpSumPieces] = {}, stash[kEpSumPieces] = {};
  int steps = 0;
#pragma unroll 1
  for (int n = 0;; ++n) {
    const int s = n % kEpStages;
    ptx::mbarrier_wait(&smem.full[s], n / kEpStages % 2);
    const EpStage stage = smem.stage[s];
    EpVector x[kEpSumPieces];
#pragma unroll
    for (int i = 0; i < kEpSumPieces; ++i) x[i] = *reinterpret_cast<const EpVector*>(smem.rows[s] + first + i * kPitch);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&smem.empty[s]);
    if (stage.tasks & kEpStop) return;
#pragma unroll
    for (int i = 0; i < kEpSumPieces; ++i) {
      if (stage.tasks & kEpBegin) sum[i] = {};
      if (stage.tasks & kEpAdd) sum[i].add(x[i], stage.weight);
      if (stage.tasks & kEpStash) {
        stash[i] = sum[i];
        sum[i] = {};
      }
      if (stage.tasks & kEpAddStash) {
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i].v[j] += stash[i].v[j];
      }
      if ((stage.tasks & kEpEnd) && first + i * kPitch < stage.bytes) {
        if (stage.residual) sum[i].add(*reinterpret_cast<const EpVector*>(stage.residual + first + i * kPitch), 1.0f);
        *reinterpret_cast<EpVector*>(stage.out + first + i * kPitch) = sum[i].to_bf16();
      }
    }
    if (stage.tasks & kEpStep) {
      ++steps;
      __syncwarp();
      if (lane == 0) {
        ptx::fence_acq_rel_cta();
        *static_cast<volatile int*>(&smem.steps[warp]) = steps;
      }
    }
  }
}

// --- signalling -----------------------------------------------------------------------------------------------------

// Values of the rows of every source's tokens of these steps, into the sums' slots.
__device__ __forceinline__ void ep_send_values(const EpCombineParams& p, const EpOperation& op, const EpRange* tokens,
                                               int begin, int end) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int s = 0; s < c.shape.num_ranks; ++s) {
#pragma unroll 1
    for (int i = begin; s != c.rank && i < min_of(end, tokens[s].size()); ++i) {
      const i64 token = tokens[s].begin + i;
      const float value = ep_row_value(p, ep_terms(p, s, token));
      if (lane < c.shape.topk)
        reinterpret_cast<float*>(ep_sum_slot(op, s, c.rank, token) + ep_bf16_bytes(c.shape.hidden))[lane] = value;
    }
  }
}

// Tells every home how many tokens' sums have been sent: as many as all summing warps have stored.
__device__ __forceinline__ void ep_signal_sums(const EpCombineParams& p, const EpOperation& op, EpCombineSmem& smem) {
  const EpCommon& c = p.c;
  const int lane = threadIdx.x % 32, num_steps = EpUnit(p, smem.tokens).sends;
  int told = 0;
#pragma unroll 1
  while (told < num_steps && *static_cast<volatile int*>(&smem.failed) == 0) {
    const int mine = lane < kEpSumWarps ? *static_cast<volatile int*>(&smem.steps[lane]) : num_steps;
    const int stored = num_steps - int(__reduce_max_sync(0xffffffffu, u32(num_steps - mine)));
    if (stored == told) continue;
    ptx::fence_acq_rel_cta();
    if (p.values) ep_send_values(p, op, smem.tokens, told, stored);
    told = stored;
    __syncwarp();
#pragma unroll 1
    for (int r = lane; r < c.shape.num_ranks; r += 32)
      if (r != c.rank) ptx::store_release_sys(ep_sum_flag(op, r, c.rank), ep_flag(op.epoch, ep_sums_format(p), told));
  }
}

__device__ __forceinline__ void ep_combine(const EpCombineParams& p) {
  extern __shared__ __align__(128) u8 smem_base[];
  EpCombineSmem& smem = *reinterpret_cast<EpCombineSmem*>(smem_base);
  const EpCommon& c = p.c;
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    smem.failed = 0;
#pragma unroll 1
    for (int s = 0; s < kEpStages; ++s) {
      ptx::mbarrier_init(&smem.full[s], 1);
      ptx::mbarrier_init(&smem.empty[s], kEpSumWarps);
    }
    ptx::fence_mbarrier_init();
  }
  ptx::grid_wait_dependencies();
  if (int(threadIdx.x) < kEpSumWarps) smem.steps[threadIdx.x] = 0;
  if (int(threadIdx.x) < c.shape.num_ranks) {
    const int r = threadIdx.x, count = r == c.rank ? c.num_tokens : c.handle[c.handle_layout.num_tokens + r];
    smem.tokens[r] = ep_tokens_of_cta(count, blockIdx.x, c.shape.num_ctas);
  }
  const EpOperation send(c, kEpCombineSend), recv(c, kEpCombineRecv);
  __syncthreads();
  if (warp < kEpSumWarps) {
    ep_sum_stages(smem);
  } else if (warp == kEpSumWarps) {
    EpFeeder feeder{smem};
    if (!ep_load_all(p, send, recv, feeder)) *static_cast<volatile int*>(&smem.failed) = 1;
    feeder.push({nullptr, nullptr, kEpStop, 0, 0}, nullptr);
  } else if (c.send) {
    ep_signal_sums(p, send, smem);
  }
  __syncthreads();
  if (*static_cast<volatile int*>(&smem.failed) != 0) return;
  if (c.send) ep_finish_send(send);
  if (c.recv) ep_finish_recv(recv, c.layout.combine_credit);
}

}  // namespace phalanx
