// The rings of combine (combine.cuh), one for each half of a CTA: two warps in turn load rows into its stages, seven add them
// up in registers.
//
//   turn[w]    loading warp w may go on, where the other one has left `next`
//   full[s]    the loading warp's lane, when it has said what is to be done, and TMA, when the row is there
//   empty[s]   the summing warps, when each has the row in registers
//   steps[w]   summing warp w has stored all sums of so many tokens; the signalling warp waits for it
#pragma once
#include "device/ep/signal.cuh"
#include "device/ptx/convert.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/tma.cuh"

namespace phalanx {

// A sum to be made of the stages from the one that this lies beside; without any term of that one, which is empty.
struct alignas(16) EpStage {
  u8* out;
  const u8* residual;
  int bytes;  // of the columns
  int terms;
  int steps;  // of so many tokens of every source all sums have been asked for before this one
  int stop;
  u64 others = 0;       // ranks whose sums tell by themselves that they have come; they are added last
  u8* slots = nullptr;  // the first of theirs, if all sent
};

// A place in the ring.
struct EpRing {
  int stage = 0;
  u32 phase = 0;

  __device__ __forceinline__ void advance(int n) {
    stage += n;
    if (stage >= kEpStages) {
      stage -= kEpStages;
      phase ^= 1;
    }
  }
};

struct EpCombineHalf {
  u8 rows[kEpStages][kEpStageBytes<false>];
  EpStage stage[kEpStages];
  float weight[kEpStages];
  u64 full[kEpStages], empty[kEpStages], turn[kEpLoadWarps];
  EpRing next;
  int broken;                                // a wait of a loading warp has failed
  int row[kEpLoadWarps][kEpUnitsAhead][32];  // the next units' terms, of each loading warp
  float row_weight[kEpLoadWarps][kEpUnitsAhead][32];
  int expert[kEpLoadWarps][kEpUnitsAhead][32];
  EpRange tokens[kEpMaxRanks];
};
struct EpCombineSmem {
  EpCombineHalf halves[kEpHalves];
  int steps[kEpHalves * kEpSumWarps];  // finished by each summing warp
  int failed;
  u64 expected;  // what a failed wait for other ranks' sums will say
};
static_assert(sizeof(EpCombineSmem) <= kEpCombineSmemBytes);

// A loading warp's side.
struct EpFeeder {
  EpCombineHalf& smem;
  int warp;               // of those that load
  u32 phase = warp == 0;  // the first warp's first turn is now
  EpRing ring = {};

  // False if a wait has failed.
  __device__ __forceinline__ bool await_turn() {
    ptx::mbarrier_wait(&smem.turn[warp], phase);
    phase ^= 1;
    ring = smem.next;
    return smem.broken == 0;
  }
  __device__ __forceinline__ void pass_turn(bool fine) {
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    smem.next = ring;
    if (!fine) smem.broken = 1;
    ptx::mbarrier_arrive(&smem.turn[1 - warp]);
  }

  // One stage for each lane in `lanes`, at most kEpStages, in their order; empty if there is no row. The first one may be
  // where the sum begins. Each lane goes on when its stage is empty: if it waited for it in a loop of its own, the warp would
  // ask for nothing before the last one is.
  __device__ __forceinline__ void push(u32 lanes, const u8* row, float weight, const EpStage& sum, bool begins) {
    const int lane = threadIdx.x % 32;
    EpRing mine = ring;
    mine.advance(__popc(lanes & ((1u << lane) - 1)));
    const bool is_first = begins && __ffs(lanes) - 1 == lane;
#pragma unroll 1
    for (bool waits = lanes >> lane & 1; __any_sync(0xffffffffu, waits);) {
      if (!waits || !ptx::mbarrier_test(&smem.empty[mine.stage], mine.phase ^ 1)) continue;
      waits = false;
      smem.weight[mine.stage] = weight;
      if (is_first) smem.stage[mine.stage] = sum;
      if (row) {
        ptx::mbarrier_arrive_expect_tx(&smem.full[mine.stage], u32(sum.bytes));
        ptx::bulk_load(smem.rows[mine.stage], row, u32(sum.bytes), &smem.full[mine.stage]);
      } else {
        ptx::mbarrier_arrive(&smem.full[mine.stage]);
      }
    }
    __syncwarp();
    ring.advance(__popc(lanes));
  }
  __device__ __forceinline__ void push_nothing(int steps, int stop) {
    const EpStage sum{nullptr, nullptr, 0, 0, steps, stop};
    push(1, nullptr, 0, sum, true);
  }
};

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
__device__ __forceinline__ void ep_add_stages(EpSum (&sum)[kPieces], EpCombineHalf& smem, EpRing& ring, int first,
                                              int count) {
  const int lane = threadIdx.x % 32;
  // Some at once: one after the other, each would wait for its barrier and for shared memory.
  constexpr int kAtOnce = 2;
#pragma unroll 1
  for (int done = 0; done < count; done += kAtOnce) {
    const int now = min_of(count - done, kAtOnce);
    EpVector x[kAtOnce][kPieces];
    float weight[kAtOnce];
    EpRing at = ring;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (j >= now) continue;
      ptx::mbarrier_wait(&smem.full[at.stage], at.phase);
      weight[j] = smem.weight[at.stage];
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        x[j][i] = *reinterpret_cast<const EpVector*>(smem.rows[at.stage] + first + i * (kEpSumWarps * kEpPitch));
      at.advance(1);
    }
    __syncwarp();
    if (lane < now) {
      EpRing mine = ring;
      mine.advance(lane);
      ptx::mbarrier_arrive(&smem.empty[mine.stage]);
    }
    ring = at;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (j >= now) continue;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) sum[i].add(x[j][i], weight[j]);
    }
  }
}

// Adds the sums of other ranks, in their order, as they come, and empties their slots. By a warp.
template <int kPieces>
__device__ __forceinline__ bool ep_add_slots(EpSum (&sum)[kPieces], const EpCommon& c, EpCombineSmem& smem,
                                             const EpStage& todo, int first) {
#pragma unroll 1
  for (u64 others = todo.others; others != 0;) {
    const int rank = ep_pop(others);
    u8* slot = todo.slots + ep_peer_idx(c.rank, rank) * i64(c.shape.max_tokens) * c.layout.sum_slot + first;
    EpVector x[kPieces];
    const auto each = [&](auto use) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (first + i * (kEpSumWarps * kEpPitch) < todo.bytes) use(i, slot + i * (kEpSumWarps * kEpPitch));
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
  constexpr int kPieces = kEpSumPieces<kFew>,
                kApart = kEpSumWarps * kEpPitch;  // bytes from a piece to the thread's next
  const int warp = int(threadIdx.x) / 32, lane = threadIdx.x % 32;
  const int first = warp % kEpSumWarps * kEpPitch + lane * 16;  // this thread's bytes of a stage
  EpCombineHalf& smem = all.halves[warp / kEpSumWarps];
  EpRing ring;
  int steps = 0;
#pragma unroll 1
  for (;;) {
    ptx::mbarrier_wait(&smem.full[ring.stage], ring.phase);
    const EpStage todo = smem.stage[ring.stage];
    if (!kFew && todo.steps > steps) {
      steps = todo.steps;
      __syncwarp();
      if (lane == 0) {
        ptx::fence_acq_rel_cta();
        *static_cast<volatile int*>(&all.steps[warp]) = steps;
      }
    }
    EpSum sum[kPieces] = {};
    ep_add_stages(sum, smem, ring, first, todo.terms);
    if (todo.terms == 0) {
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(&smem.empty[ring.stage]);
      ring.advance(1);
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
        if (i * kApart < left) sum[i].add(*reinterpret_cast<const EpVector*>(todo.residual + first + i * kApart), 1.0f);
    }
    EpVector packed[kPieces];  // never kEpNothing: NaN is 0x7fff
#pragma unroll
    for (int i = 0; i < kPieces; ++i) packed[i] = sum[i].to_bf16();
    u8* out = todo.out + first;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (i * kApart >= left) continue;
      const EpVector& v = packed[i];
      if constexpr (kFew)
        ptx::store_relaxed_sys_16(out + i * kApart, {v.word[0], v.word[1], v.word[2], v.word[3]});
      else
        *reinterpret_cast<EpVector*>(out + i * kApart) = v;
    }
  }
}

}  // namespace phalanx
