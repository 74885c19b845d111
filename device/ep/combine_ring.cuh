// The rings of combine (combine.cuh), one for each half of a CTA: one warp lists rows, one loads them into the ring's
// stages, seven add them up in registers.
//
//   listed[i]  the listing warp's lane, when it has said which row comes and what is to be done with it
//   free[i]    the loading warp, when that row has been added, so that another one can be listed there
//   full[s]    the loading warp, and TMA, when the row is there
//   empty[s]   the summing threads, when each has its part of the row in registers
//   steps[w]   summing warp w has stored all sums of so many tokens; the signalling warp waits for it
#pragma once
#include "device/ep/signal.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/tma.cuh"

namespace phalanx {

// A stage's row, or if null nothing.
struct alignas(16) EpListed {
  const u8* row;
  int bytes;  // of the columns; below 0: the last one of all
  float weight;
};

// A sum to be made of the stages from the one that is listed with it; without any term of that one, which is empty.
struct alignas(16) EpTodo {
  u8* out;
  const u8* residual;
  int bytes;  // of the columns
  int terms;
  int steps;  // of so many tokens of every source all sums are listed before this one
  int stop;
  u64 others = 0;       // ranks whose sums tell by themselves that they have come; they are added last
  u8* slots = nullptr;  // the first of theirs, if all sent
};

// A place among kCount that are used in turn.
template <int kCount>
struct EpPlace {
  int at = 0;
  u32 phase = 0;

  __device__ __forceinline__ void advance(int n) {
    at += n;
    if (at >= kCount) {
      at -= kCount;
      phase ^= 1;
    }
  }
};

struct EpCombineHalf {
  u8 rows[kEpStages][kEpStageBytes<false>];
  EpListed list[kEpListed];
  EpTodo todo[kEpListed];
  u64 listed[kEpListed], free[kEpListed], full[kEpStages], empty[kEpStages];
  int row[kEpUnitsAhead][32];  // the next units' terms
  float row_weight[kEpUnitsAhead][32];
  int expert[kEpUnitsAhead][32];
  EpRange tokens[kEpMaxRanks];
};
struct EpCombineSmem {
  EpCombineHalf halves[kEpHalves];
  int steps[kEpHalves * kEpSumWarps];  // finished by each summing warp
  int failed;
  u64 expected;  // what a failed wait for other ranks' sums will say
};
static_assert(sizeof(EpCombineSmem) <= kEpCombineSmemBytes);

// The listing warp's side.
struct EpLister {
  EpCombineHalf& smem;
  EpPlace<kEpListed> next = {};

  // A row for each lane in `lanes`, in their order, or an empty stage where it has none. With the first one may begin
  // `sum`.
  __device__ __forceinline__ void push(u32 lanes, const EpListed& mine, const EpTodo& sum, bool begins) {
    const int lane = threadIdx.x % 32;
    EpPlace<kEpListed> place = next;
    place.advance(__popc(lanes & ((1u << lane) - 1)));
    if (lanes >> lane & 1) {
      ptx::mbarrier_wait(&smem.free[place.at], place.phase ^ 1);
      smem.list[place.at] = mine;
      if (begins && __ffs(lanes) - 1 == lane) smem.todo[place.at] = sum;
      ptx::mbarrier_arrive(&smem.listed[place.at]);
    }
    __syncwarp();
    next.advance(__popc(lanes));
  }
  __device__ __forceinline__ void push_nothing(const EpTodo& sum) {
    push(1, {nullptr, sum.stop ? -1 : 0, 0}, sum, true);
  }
};

// What is listed, into the ring. By a thread.
__device__ __forceinline__ void ep_load_listed(EpCombineHalf& smem) {
  EpPlace<kEpListed> next, used;  // `used`: what the stages before held
  EpPlace<kEpStages> ring;
#pragma unroll 1
  for (int i = 0;; ++i) {
    ptx::mbarrier_wait(&smem.listed[next.at], next.phase);
    const EpListed listed = smem.list[next.at];
    u64* full = &smem.full[ring.at];
    ptx::mbarrier_wait(&smem.empty[ring.at], ring.phase ^ 1);
    if (listed.row) {
      ptx::mbarrier_arrive_expect_tx(full, u32(listed.bytes));
      ptx::bulk_load(smem.rows[ring.at], listed.row, u32(listed.bytes), full);
    } else {
      ptx::mbarrier_arrive(full);
      if (listed.bytes < 0) return;
    }
    if (i >= kEpStages) {
      ptx::mbarrier_arrive(&smem.free[used.at]);
      used.advance(1);
    }
    next.advance(1);
    ring.advance(1);
  }
}

// --- summing --------------------------------------------------------------------------------------------------------

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

// Adds the next `count` stages.
template <int kPieces>
__device__ __forceinline__ void ep_add_stages(EpSum (&sum)[kPieces], EpCombineHalf& smem, EpPlace<kEpStages>& ring,
                                              EpPlace<kEpListed>& next, int first, int count) {
#pragma unroll 1
  for (int left = count; left > 0; --left) {
    ptx::mbarrier_wait(&smem.full[ring.at], ring.phase);
    const float weight = smem.list[next.at].weight;
    EpVector x[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      x[i] = *reinterpret_cast<const EpVector*>(smem.rows[ring.at] + first + i * kEpSumPitch);
    ptx::mbarrier_arrive(&smem.empty[ring.at]);
    ring.advance(1);
    next.advance(1);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) sum[i].add(x[i], weight);
  }
}

// Adds the sums of other ranks, in their order, as they come, and empties their slots. By a warp.
template <int kPieces>
__device__ __forceinline__ bool ep_add_slots(EpSum (&sum)[kPieces], const EpCommon& c, EpCombineSmem& smem,
                                             const EpTodo& todo, int first) {
#pragma unroll 1
  for (u64 others = todo.others; others != 0;) {
    const int rank = ep_pop(others);
    u8* slot = todo.slots + ep_peer_idx(c.rank, rank) * i64(c.shape.max_tokens) * c.layout.sum_slot + first;
    EpVector x[kPieces];
    const auto each = [&](auto use) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (first + i * kEpSumPitch < todo.bytes) use(i, slot + i * kEpSumPitch);
    };
    const auto look = [&] {
      bool is_here = true;
      each([&](int i, const u8* at) {
        x[i] = ep_look_at_slot(at);
        is_here = is_here && ep_is_here(x[i]);
      });
      return is_here;
    };
    if (!ep_look_until(c, kEpPhaseSums, rank, smem.expected, look)) return false;
    each([&](int i, u8* at) {
      sum[i].add(x[i], 1.0f);
      ep_empty_slot(at);
    });
  }
  return true;
}

// By a summing warp.
template <bool kFew>
__device__ __forceinline__ void ep_sum_stages(const EpCommon& c, EpCombineSmem& all) {
  constexpr int kPieces = kEpSumPieces<kFew>;
  const int warp = int(threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int first = warp % kEpSumWarps * kEpPitch + lane * 16;  // this thread's bytes of a stage
  EpCombineHalf& smem = all.halves[warp / kEpSumWarps];
  EpPlace<kEpStages> ring;
  EpPlace<kEpListed> next;
  int steps = 0;
#pragma unroll 1
  for (;;) {
    ptx::mbarrier_wait(&smem.full[ring.at], ring.phase);
    const EpTodo todo = smem.todo[next.at];
    if (!kFew && todo.steps > steps) {
      __syncwarp();
      if (lane == 0) {
        ptx::fence_acq_rel_cta();
        atomicAdd(&all.steps[warp], todo.steps - steps);  // not a store: racecheck knows that atomics do not race
      }
      steps = todo.steps;
    }
    EpSum sum[kPieces] = {};
    ep_add_stages(sum, smem, ring, next, first, todo.terms);
    if (todo.terms == 0) {
      ptx::mbarrier_arrive(&smem.empty[ring.at]);
      ring.advance(1);
      next.advance(1);
      if (todo.stop) return;
    }
    if (kFew && !ep_add_slots(sum, c, all, todo, first)) {
      *static_cast<volatile int*>(&all.failed) = 1;
      continue;  // whoever loads must find empty stages
    }
    const int left = todo.bytes - first;
    if (todo.residual) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (i * kEpSumPitch < left)
          sum[i].add(*reinterpret_cast<const EpVector*>(todo.residual + first + i * kEpSumPitch), 1.0f);
    }
    EpVector packed[kPieces];  // never kEpNothing: NaN is 0x7fff
#pragma unroll
    for (int i = 0; i < kPieces; ++i) packed[i] = sum[i].to_bf16();
    u8* out = todo.out + first;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (i * kEpSumPitch >= left) continue;
      const EpVector& v = packed[i];
      if constexpr (kFew)
        ptx::store_relaxed_sys_16(out + i * kEpSumPitch, {v.word[0], v.word[1], v.word[2], v.word[3]});
      else
        *reinterpret_cast<EpVector*>(out + i * kEpSumPitch) = v;
    }
  }
}

}  // namespace phalanx
