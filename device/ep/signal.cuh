// Operations, their flags, and bounded waits.
//
// Who publishes: a warp stores data to a peer, meets at __syncwarp, and lane 0 makes a fence.acq_rel.sys and stores the
// flag.
// Who waits: lane 0 loads the flag with ld.acquire.sys until it is there, and the warp meets at __syncwarp. So all that
// the sending warp stored before is visible to all of the waiting warp. A CTA does the same with a barrier instead.
//
// A wait ends when the flag comes, when the time is over, or when somebody has set the rank's stop word: the first wait
// that fails sets it, so that all others of the kernel leave at once. Nothing traps: the kernel ends, and the host
// reads the status.
#pragma once
#include "device/ep/params.h"
#include "device/ptx/sync.cuh"
#include "device/ptx/system.cuh"

namespace phalanx {

__device__ __forceinline__ EpWords* ep_words(const EpCommon& c) { return reinterpret_cast<EpWords*>(c.peers[c.rank]); }

// One half of one operation, as all threads of its role see it.
struct EpOperation {
  const EpCommon& c;
  u64 epoch;
  EpSequence sequence;
  i64 buffer_offset;

  __device__ __forceinline__ EpOperation(const EpCommon& common, EpSequence s)
      : c(common), epoch(ptx::load_relaxed_sys(&ep_words(common)->epoch[s]) + 1), sequence(s) {
    const bool is_second = common.shape.num_buffers == 2 && epoch % 2 != 0;
    buffer_offset = common.layout.buffers + (is_second ? common.layout.buffer_stride : 0);
  }

  // Rank r's memory at `offset` of this operation's buffer.
  __device__ __forceinline__ u8* buffer(int r, i64 offset) const { return c.peers[r] + buffer_offset + offset; }
  __device__ __forceinline__ u64* word(int r, i64 offset, int index) const {
    return reinterpret_cast<u64*>(c.peers[r] + offset) + index;
  }
};

__device__ __noinline__ void ep_record(const EpCommon& c, EpState state, EpPhase phase, int peer, u64 expected,
                                       u64 seen, u64 who) {
  EpWords* words = ep_words(c);
  if (ptx::atomic_exchange_relaxed_gpu(&words->recorded, 1) == 0) {
    EpStatus* status = c.status;
    status->peer = peer;
    status->phase = phase;
    status->aborter = int(who) - 1;
    status->epoch = ep_flag_epoch(expected);
    status->expected = expected;
    status->seen = seen;
    ptx::store_release_sys(&status->state, state);
  }
  ptx::store_relaxed_sys(&words->stop, u64(1 + c.rank));
}

// Called in every turn of a wait: false when it is time to give up.
struct EpPatience {
  static constexpr int kTurnsPerLook = 64;
  const EpCommon& c;
  EpPhase phase;
  int peer, turns = 0;
  u64 expected, start = 0;

  __device__ __forceinline__ EpPatience(const EpCommon& common, EpPhase wait_phase, int wait_peer, u64 wanted)
      : c(common), phase(wait_phase), peer(wait_peer), expected(wanted) {}

  __device__ __forceinline__ bool lasts(u64 seen) {
    if (++turns % kTurnsPerLook != 0) return true;
    const u64 now = ptx::global_timer();
    if (start == 0) start = now;
    const u64 who = ptx::load_relaxed_sys(&ep_words(c)->stop);
    if (who == 0 && now - start <= c.timeout_ns) return true;
    ep_record(c, who ? kEpAborted : kEpTimeout, phase, peer, expected, seen, who);
    return false;
  }
};

// By one thread: until the flag of this rank has the epoch and count of `expected`, or more. False: it failed.
__device__ __noinline__ bool ep_wait(const EpCommon& c, EpPhase phase, int peer, const u64* flag, u64 expected) {
  constexpr u64 kOrder = ~(u64(0xff) << 24);  // all but the format
  EpPatience patience(c, phase, peer, expected);
  u64 seen = ptx::load_acquire_sys(flag);
  while ((seen & kOrder) < (expected & kOrder)) {
    if (!patience.lasts(seen)) return false;
    seen = ptx::load_acquire_sys(flag);
  }
  if (ep_flag_epoch(seen) == ep_flag_epoch(expected) && ep_flag_format(seen) != ep_flag_format(expected)) {
    ep_record(c, kEpMismatch, phase, peer, expected, seen, 0);
    return false;
  }
  return true;
}

// Warps [first, first + count) of a CTA that play a role, and meet at a named barrier of their own.
struct EpRole {
  int barrier, first_warp, num_warps;

  __device__ __forceinline__ int warp() const { return int(threadIdx.x) / 32 - first_warp; }
  __device__ __forceinline__ int thread() const { return int(threadIdx.x) - first_warp * 32; }
  __device__ __forceinline__ int num_threads() const { return num_warps * 32; }
  __device__ __forceinline__ void sync() const { ptx::named_barrier_sync(barrier, num_threads()); }

  // True in all threads if it is in each. `vote` is shared memory of the role, 0 at the start and left so on success.
  __device__ __forceinline__ bool all(bool mine, int* vote) const {
    if (!mine) *vote = 1;
    sync();
    return *reinterpret_cast<volatile int*>(vote) == 0;
  }
};

// All ranks, this one too, have finished reading what it has put into the same buffer before. By one thread for each.
__device__ __forceinline__ bool ep_wait_for_credits(const EpOperation& op, const EpRole& role, EpPhase phase,
                                                    i64 credits, int* vote) {
  const u64 buffers = op.c.shape.num_buffers;
  bool fine = true;
  const int peer = role.thread();
  if (peer < op.c.shape.num_ranks && op.epoch > buffers)
    fine = ep_wait(op.c, phase, peer, op.word(op.c.rank, credits, peer), ep_flag(op.epoch - buffers, 0, 0));
  return role.all(fine, vote);
}

// By the whole role of every CTA, at its end. The last CTA takes the step to the next epoch: nobody reads the words any
// more then. If it has received, it gives all ranks their credits: every CTA has read what it waited for.
__device__ __forceinline__ void ep_finish(const EpOperation& op, const EpRole& role, i64 credits) {
  const EpCommon& c = op.c;
  role.sync();
  if (role.thread() != 0) return;
  EpWords* words = ep_words(c);
  const u64 num_done = ptx::atomic_add_acq_rel_gpu(&words->done[op.sequence], 1) + 1;
  if (num_done != u64(c.shape.num_ctas)) return;
  words->done[op.sequence] = 0;
  words->epoch[op.sequence] = op.epoch;
  if (credits == 0) return;
  ptx::fence_acq_rel_sys();
#pragma unroll 1
  for (int r = 0; r < c.shape.num_ranks; ++r)
    ptx::store_relaxed_sys(op.word(r, credits, c.rank), ep_flag(op.epoch, 0, 0));
}

// --- pieces: a sending warp's flags tell how many of its own have come ----------------------------------------------

__device__ __forceinline__ u64* ep_piece_flag(const EpOperation& op, int at, i64 flags, int source, int piece) {
  return op.word(at, flags, (source * op.c.shape.num_ctas + int(blockIdx.x)) * kEpSendWarps + piece % kEpSendWarps);
}

// By a warp that has sent piece i, of so many: raises its flag at the ranks [begin, end), if it is time.
__device__ __forceinline__ void ep_tell(const EpOperation& op, EpRange ranks, i64 flags, EpFormat format, int i,
                                        int num_pieces) {
  const EpCommon& c = op.c;
  const int count = i / kEpSendWarps + 1;
  if (c.shape.log2_parts == 0 && count % kEpPiecesPerFlag != 0 && i + kEpSendWarps < num_pieces) return;
  __syncwarp();
#pragma unroll 1
  for (int r = ranks.begin + int(threadIdx.x) % 32; r < ranks.end; r += 32) {
    if (r == c.rank) continue;
    ptx::fence_acq_rel_sys();
    ptx::store_relaxed_sys(ep_piece_flag(op, r, flags, c.rank, i), ep_flag(op.epoch, format, count));
  }
}

// By one thread: until source's piece i is here.
__device__ __forceinline__ bool ep_wait_for_piece(const EpOperation& op, EpPhase phase, int source, i64 flags,
                                                  EpFormat format, int i) {
  return ep_wait(op.c, phase, source, ep_piece_flag(op, op.c.rank, flags, source, i),
                 ep_flag(op.epoch, format, i / kEpSendWarps + 1));
}

// --- the choices of a token, one a lane -----------------------------------------------------------------------------

// Bits of all lanes, OR-ed.
__device__ __forceinline__ u64 ep_or_over_lanes(u64 bits) {
  return u64(__reduce_or_sync(0xffffffffu, u32(bits >> 32))) << 32 | __reduce_or_sync(0xffffffffu, u32(bits));
}

// The ranks that hold the experts in the lanes (below 0: none).
__device__ __forceinline__ u64 ep_ranks_of(const EpCommon& c, int expert) {
  const int r = expert < 0 ? -1 : ep_rank_of(c.first_expert, c.shape.num_ranks, expert);
  return ep_or_over_lanes(r < 0 ? 0 : u64(1) << r);
}

// Of source s's token t in arrays [R][T][K], and of this rank's token in [T][K].
__device__ __forceinline__ i64 ep_choice(const EpCommon& c, int source, i64 token) {
  return (i64(source) * c.shape.max_tokens + token) * c.shape.topk;
}

// Takes the lowest bit away and returns its number.
__device__ __forceinline__ int ep_pop(u64& bits) {
  const int lowest = __ffsll(bits) - 1;
  bits &= bits - 1;
  return lowest;
}
__device__ __forceinline__ int ep_pop(u32& bits) {
  const int lowest = __ffs(bits) - 1;
  bits &= bits - 1;
  return lowest;
}

}  // namespace phalanx
