// Operations, their flags, and bounded waits.
//
// Who publishes: a warp stores data to a peer, meets at __syncwarp, and a lane stores the flag with st.release.sys,
// which takes 0.6 us less than a fence before a plain store.
// Who waits: lane 0 loads the flag with ld.acquire.sys until it is there, and the warp meets at __syncwarp. So all that
// the sending warp stored before is visible to all of the waiting warp. A CTA does the same with a barrier instead.
// Where few tokens are sent, slots are waited for word by word (layout.h), and nothing is released.
//
// A wait ends when the flag comes, when the time is over, or when somebody has set the rank's stop word: the first wait
// that fails sets it, so that all others of the kernel leave at once. Nothing traps: the kernel ends, and the host
// reads the status.
#pragma once
#include "device/ep/params.h"
#include "device/ptx/memory.cuh"
#include "device/ptx/sync.cuh"
#include "device/ptx/system.cuh"

namespace phalanx {

__device__ __forceinline__ EpWords* ep_words(const EpCommon& c) { return reinterpret_cast<EpWords*>(c.peers[c.rank]); }
__device__ __forceinline__ u64 ep_stop_word(const EpCommon& c) { return ptx::load_relaxed_sys(&ep_words(c)->stop); }

// Operations that this CTA has finished; only it knows of the word.
__device__ __forceinline__ u64* ep_epoch_word(const EpCommon& c, EpSequence s) {
  return reinterpret_cast<u64*>(c.peers[c.rank] + c.layout.epochs) + s * c.shape.num_ctas + int(blockIdx.x);
}

// One half of one operation, as all threads of its role see it.
struct EpOperation {
  const EpCommon& c;
  u64 epoch;
  EpSequence sequence;
  i64 buffer_offset;

  __device__ __forceinline__ EpOperation(const EpCommon& common, EpSequence s)
      : c(common), epoch(ptx::load_relaxed_sys(ep_epoch_word(common, s)) + 1), sequence(s) {
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

// By one thread, when an operation begins: false if an earlier one of this rank has failed, or somebody has aborted the
// group. The CTAs' epochs no longer say then which operation this is, and a peer that comes late would take what this
// one sends for what it waits for. Nor may an operation whose two halves are one kernel stand between the halves of
// another, as each would receive what the other has sent. `receives`: this CTA counts what is received. `who`: the stop
// word, loaded long enough before.
__device__ __forceinline__ bool ep_may_begin(const EpOperation& send, const EpOperation& recv, EpPhase phase,
                                             bool receives, u64 who) {
  const EpCommon& c = send.c;
  if (who != 0) {
    ep_record(c, kEpAborted, kEpPhaseNone, c.rank, 0, 0, who);
    return false;
  }
  if (!c.send || !receives || send.epoch == recv.epoch) return true;
  ep_record(c, kEpSendUnderWay, phase, c.rank, ep_flag(recv.epoch, 0, 0), ep_flag(send.epoch, 0, 0), 0);
  return false;
}

// Where a handle is given: this rank has as many tokens as it was made of. The same in all threads.
__device__ __forceinline__ bool ep_fits_handle(const EpCommon& c, EpPhase phase) {
  const int tokens = c.handle[c.handle_layout.num_tokens + c.rank];
  if (tokens == c.num_tokens) return true;
  if (threadIdx.x == 0) ep_record(c, kEpOtherTokens, phase, c.rank, u64(tokens), u64(c.num_tokens), 0);
  return false;
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
    const u64 who = ep_stop_word(c);
    if (who == 0 && now - start <= c.timeout_ns) return true;
    ep_record(c, who ? kEpAborted : kEpTimeout, phase, peer, expected, seen, who);
    return false;
  }
};

// By one thread: until the flag of this rank has the epoch and count of `expected`, or more. False: it failed.
__device__ __noinline__ bool ep_wait(const EpCommon& c, EpPhase phase, int peer, const u64* flag, u64 expected) {
  EpPatience patience(c, phase, peer, expected);
  u64 seen = ptx::load_acquire_sys(flag);
  while (!ep_flag_has_come(seen, expected)) {
    if (!patience.lasts(seen)) return false;
    seen = ptx::load_acquire_sys(flag);
  }
  if (ep_flag_epoch(seen) == ep_flag_epoch(expected) && ep_flag_format(seen) != ep_flag_format(expected)) {
    ep_record(c, kEpMismatch, phase, peer, expected, seen, 0);
    return false;
  }
  return true;
}

// A word of shared memory, as other warps have left it by now.
__device__ __forceinline__ int ep_look(const int& word) { return *static_cast<const volatile int*>(&word); }

// Warps [first, first + count) of a CTA that play a role, and meet at a named barrier of their own.
struct EpRole {
  int barrier, first_warp, num_warps;

  __device__ __forceinline__ int warp() const { return int(threadIdx.x) / 32 - first_warp; }
  __device__ __forceinline__ int thread() const { return int(threadIdx.x) - first_warp * 32; }
  __device__ __forceinline__ int num_threads() const { return num_warps * 32; }
  __device__ __forceinline__ bool has_this_warp() const { return warp() >= 0 && warp() < num_warps; }
  __device__ __forceinline__ void sync() const { ptx::named_barrier_sync(barrier, num_threads()); }

  // True in all threads if it is in each; else `failed`, shared memory, becomes 1.
  __device__ __forceinline__ bool all(bool mine, int* failed) const {
    if (!mine) *failed = 1;
    return ptx::named_barrier_all(barrier, num_threads(), mine);
  }
};

// So many CTAs of all ranks, this one too, have finished reading what this rank has put into the same buffer before. By
// so many threads, each of which waits for some.
__device__ __forceinline__ bool ep_wait_for_credits(const EpOperation& op, EpPhase phase, i64 credits, int first_cta,
                                                    const Divisor& ctas, int thread, int num_threads) {
  const EpShape& shape = op.c.shape;
  const u64 buffers = shape.num_buffers;
  bool fine = true;
#pragma unroll 1
  for (int i = thread; fine && op.epoch > buffers && i < shape.num_ranks * ctas.value; i += num_threads) {
    const int peer = ctas.of(i), cta = first_cta + i - peer * ctas.value;
    fine = ep_wait(op.c, phase, peer, op.word(op.c.rank, credits, peer * shape.num_ctas + cta),
                   ep_flag(op.epoch - buffers, 0, 0));
  }
  return fine;
}

// Every rank gets its credit: this CTA has read what it waited for in the operations up to `epoch`. By a warp.
__device__ __forceinline__ void ep_give_credits(const EpOperation& op, i64 credits, u64 epoch) {
  const EpCommon& c = op.c;
#pragma unroll 1
  for (int r = threadIdx.x % 32; r < c.shape.num_ranks; r += 32)
    ptx::store_release_sys(op.word(r, credits, c.rank * c.shape.num_ctas + int(blockIdx.x)), ep_flag(epoch, 0, 0));
}

// With two buffers credits are needed two operations later only: when the next kernel begins, a warp that has nothing
// else to do gives them, so that no kernel's end waits for them to cross a link. Whichever half that kernel is of: one
// that only sends gives them before it waits for any, as the peers' may wait for these.
__device__ __forceinline__ void ep_give_late_credits(const EpOperation& recv, i64 credits) {
  if (recv.c.shape.num_buffers == 2 && recv.epoch > 1) ep_give_credits(recv, credits, recv.epoch - 1);
}

// By the first warp behind the CTA's last barrier, if nothing failed: the step to the next epoch.
__device__ __forceinline__ void ep_finish_send(const EpOperation& op) {
  if (threadIdx.x == 0) *ep_epoch_word(op.c, op.sequence) = op.epoch;
}
__device__ __forceinline__ void ep_finish_recv(const EpOperation& op, i64 credits) {
  ep_finish_send(op);
  if (op.c.shape.num_buffers == 1 && threadIdx.x < 32) ep_give_credits(op, credits, op.epoch);
}

// use(i, load(i)) for i = first, first + step, ... below `count`; some are loaded before the first of them is used.
// There is no branch between the loads, as what branches meet in would wait for them; instead the last one is loaded
// again.
template <int kAhead = 4, class Load, class Use>
__device__ __forceinline__ void ep_load_ahead(int first, int step, int count, Load load, Use use) {
#pragma unroll 1
  for (; first < count; first += kAhead * step) {
    decltype(load(0)) loaded[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) loaded[j] = load(min_of(first + j * step, count - 1));
#pragma unroll
    for (int j = 0; j < kAhead; ++j)
      if (first + j * step < count) use(first + j * step, loaded[j]);
  }
}

// --- pieces of tokens -----------------------------------------------------------------------------------------------

__device__ __forceinline__ u64* ep_piece_flag(const EpOperation& op, int at, int source, i64 token, int part) {
  const EpShape& shape = op.c.shape;
  return op.word(at, op.c.layout.token_flags,
                 int(source * ep_flags_per_rank(shape) + (token << shape.log2_parts) + part));
}

// Pieces that all warps of a CTA share: each takes the next one when it has done with the last. `next` is shared
// memory, 0 at the start. By a warp.
__device__ __forceinline__ int ep_take(int* next) {
  int taken = 0;
  if (threadIdx.x % 32 == 0) taken = atomicAdd(next, 1);
  return __shfl_sync(0xffffffffu, taken, 0);
}

// 16 bytes past L1.
__device__ __forceinline__ EpVector ep_load(const u8* from) {
  const uint4 v = ptx::load_cg_16(from);
  return {{v.x, v.y, v.z, v.w}};
}

// --- slots that tell by themselves that they have come --------------------------------------------------------------

// 16 bytes of a slot, of which any word may be missing.
__device__ __forceinline__ EpVector ep_look_at_slot(const u8* from) {
  const uint4 v = ptx::load_relaxed_sys_16(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ bool ep_is_here(const EpVector& v) {
  return v.word[0] != kEpNothing && v.word[1] != kEpNothing && v.word[2] != kEpNothing && v.word[3] != kEpNothing;
}
// What was read; the credit that follows lets the peer send again.
__device__ __forceinline__ void ep_empty_slot(u8* at) {
  *reinterpret_cast<EpVector*>(at) = {{kEpNothing, kEpNothing, kEpNothing, kEpNothing}};
}
__device__ __forceinline__ void ep_put_into_slot(u8* at, const EpVector& v) {
  ptx::store_relaxed_sys_16(
      at, {ep_something(v.word[0]), ep_something(v.word[1]), ep_something(v.word[2]), ep_something(v.word[3])});
}
__device__ __forceinline__ u32* ep_word_of(float* p) { return reinterpret_cast<u32*>(p); }

// look() until it is true in all lanes. By a warp; false if the peer's data did not come in time.
template <class Look>
__device__ __forceinline__ bool ep_look_until(const EpCommon& c, EpPhase phase, int peer, u64 expected, Look look) {
  EpPatience patience(c, phase, peer, expected);
#pragma unroll 1
  while (!__all_sync(0xffffffffu, look()))
    if (!__all_sync(0xffffffffu, patience.lasts(kEpNothing))) return false;
  return true;
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
