// The sending half of routing; route.cuh says how.
#pragma once
#include "device/ep/route_state.cuh"

namespace phalanx {

__device__ __forceinline__ u64* ep_words_at(const EpOperation& op, int rank, i64 region, i64 at) {
  return reinterpret_cast<u64*>(op.buffer(rank, region)) + at;
}

// use(i, load(token, k)) for the choices k of these tokens, i = 0 for the first token's first. A warp takes as many
// tokens at once as it has lanes for.
template <class Load, class Use>
__device__ __forceinline__ void ep_each_choice(const EpRole& role, const Divisor& by_topk, EpRange tokens, Load load,
                                               Use use) {
  const int lane = threadIdx.x % 32, topk = by_topk.value, at_once = by_topk.of(32), mine = by_topk.of(lane),
            k = lane - mine * topk;
  ep_load_ahead(
      mine < at_once ? role.warp() * at_once + mine : tokens.size(), role.num_warps * at_once, tokens.size(),
      [&](int t) { return load(tokens.begin + t, k); }, [&](int t, auto value) { use(t * topk + k, value); });
}
__device__ __forceinline__ float ep_own_weight(const EpDispatchParams& p, int token, int k) {
  return p.topk_weights ? p.topk_weights[token * p.weights_stride + k] : 1.0f;
}

// How many tokens this rank has, and what it sends of them.
__device__ __forceinline__ void ep_send_header(const EpDispatchParams& p, const EpOperation& op, const EpRole& role) {
  const int rank = role.thread();
  if (blockIdx.x == 0 && rank < op.c.shape.num_ranks)
    ptx::store_relaxed_sys(ep_words_at(op, rank, op.c.layout.headers, op.c.rank),
                           ep_flag(op.epoch, p.sent, op.c.num_tokens));
}

// Numbers choices, experts or below 0, in order: next[e] is the next choice's number of e; `put` gets place, expert and
// number, below 0 where there is no choice. By a warp, 32 choices at a time.
template <class Put>
__device__ __forceinline__ void ep_number_choices(const int* experts, int num_choices, int* next, Put put) {
  const int lane = threadIdx.x % 32;
  const u32 lower_lanes = (1u << lane) - 1;
#pragma unroll 1
  for (int first = 0; first < num_choices; first += 32) {
    const int i = first + lane, e = i < num_choices ? experts[i] : -1;
    const u32 same = __match_any_sync(0xffffffffu, e >= 0 ? e : -1 - lane);
    const int number = e >= 0 ? next[e] + __popc(same & lower_lanes) : -1;
    __syncwarp();
    if (e >= 0 && (same & lower_lanes) == 0) next[e] += __popc(same);
    __syncwarp();
    if (i < num_choices) put(i, e, number);
  }
}

// By all threads, before roles begin: what ep_count_choices adds to.
__device__ __forceinline__ void ep_clear_counts(const EpRouteState& state) {
#pragma unroll 1
  for (int e = threadIdx.x; e < 2 * state.p.c.shape.num_experts; e += 32 * kEpDispatchWarps) state.sent(0)[e] = 0;
}

// Few tokens: every CTA counts all of this rank's choices, and so knows the numbers of its own ones.
__device__ __forceinline__ void ep_count_choices(const EpDispatchParams& p, const EpRole& role,
                                                 const EpRouteState& state, EpRange tokens) {
  const EpCommon& c = p.c;
  const EpShape& shape = c.shape;
  const int num_choices = tokens.size() * shape.topk, begin = tokens.begin * shape.topk;
  int *experts = c.handle + c.handle_layout.experts + begin, *total = state.sent(0), *before = state.sent(1);
  ep_each_choice(
      role, c.by.topk, {0, c.num_tokens}, [&](int token, int k) { return ep_load_choice(p, token, k); },
      [&](int i, EpChoice choice) {
        const int expert = ep_expert_of(p, choice);
        if (expert >= 0) atomicAdd(&total[expert], 1);
        if (expert >= 0 && i < begin) atomicAdd(&before[expert], 1);
        if (i >= begin && i < begin + num_choices) state.own()[i - begin] = experts[i - begin] = expert;
      });
  role.sync();
}

// They go to the ranks that hold the experts; how many there are of an expert, one CTA says.
__device__ __forceinline__ void ep_send_choices(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                const EpRouteState& state, EpRange tokens) {
  const EpCommon& c = p.c;
  const EpShape& shape = c.shape;
  const int num_choices = tokens.size() * shape.topk, step = role.num_threads();
  int *total = state.sent(0), *before = state.sent(1);
  const i64 base = ep_choice(c, c.rank, tokens.begin);
  if (role.warp() == 0) {
    ep_number_choices(state.own(), num_choices, before, [&](int i, int e, int number) {
      const int owner = e < 0 ? -1 : ep_rank_of(c.first_expert, shape.num_ranks, e);
#pragma unroll 1
      for (int r = 0; r < shape.num_ranks; ++r)
        ptx::store_relaxed_sys(
            ep_words_at(op, r, c.layout.choices, base + i),
            ep_word(op.epoch, u32(r == owner ? ep_numbered_choice(e - c.first_expert[r], number) : kEpNotHere)));
    });
    return;
  }
#pragma unroll 1
  for (int e = int(blockIdx.x) + (role.thread() - 32) * ep_num_receivers(shape); e < shape.num_experts;
       e += (step - 32) * ep_num_receivers(shape)) {
    const int r = ep_rank_of(c.first_expert, shape.num_ranks, e);
    ptx::store_relaxed_sys(
        ep_words_at(op, r, c.layout.counts, c.rank * shape.max_local_experts + e - c.first_expert[r]),
        ep_word(op.epoch, u32(total[e])));
  }
  ep_each_choice(
      EpRole{kEpRouters, role.first_warp + 1, role.num_warps - 1}, c.by.topk, tokens,
      [&](int token, int k) { return ep_own_weight(p, token, k); },
      [&](int i, float weight) {
#pragma unroll 1
        for (int r = 0; r < shape.num_ranks; ++r)
          ptx::store_relaxed_sys(ep_words_at(op, r, c.layout.weights, base + i),
                                 ep_word(op.epoch, __float_as_uint(weight)));
      });
}

// Numbers this CTA's choices of each expert, and sends how many there are. Each warp numbers some; sent(w)[e] becomes
// how many choices of e the warps before it have.
__device__ __forceinline__ void ep_count_own_choices(const EpOperation& op, const EpRole& role,
                                                     const EpRouteState& state, int num_choices, int piece) {
  const EpCommon& c = op.c;
  const int begin = min_of(role.warp() * piece, num_choices), end = min_of(begin + piece, num_choices);
  int* own = state.own() + begin;
  int* next = state.sent(role.warp());
#pragma unroll 1
  for (int e = threadIdx.x % 32; e < c.shape.num_experts; e += 32) next[e] = 0;
  role.sync();  // own is written as well
  ep_number_choices(own, end - begin, next, [&](int i, int e, int number) { own[i] = ep_numbered_choice(e, number); });
  role.sync();
#pragma unroll 1
  for (int e = role.thread(); e < c.shape.num_experts; e += role.num_threads()) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kEpRouteWarps; ++w) {
      const int count = state.sent(w)[e];
      state.sent(w)[e] = sum;
      sum += count;
    }
    const int r = ep_rank_of(c.first_expert, c.shape.num_ranks, e);
    const i64 cta = i64(c.rank) * c.shape.num_ctas + blockIdx.x;
    reinterpret_cast<int*>(op.buffer(r, c.layout.counts))[cta * c.shape.max_local_experts + e - c.first_expert[r]] =
        sum;
  }
  role.sync();
}

// Many tokens: this CTA's choices alone.
__device__ __forceinline__ void ep_load_choices(const EpDispatchParams& p, const EpRole& role,
                                                const EpRouteState& state, EpRange tokens) {
  const EpCommon& c = p.c;
  int* experts = c.handle + c.handle_layout.experts + i64(tokens.begin) * c.shape.topk;
  ep_each_choice(
      role, c.by.topk, tokens, [&](int token, int k) { return ep_load_choice(p, token, k); },
      [&](int i, EpChoice choice) { state.own()[i] = experts[i] = ep_expert_of(p, choice); });
}

// They go out numbered, with weights, behind a flag.
__device__ __forceinline__ void ep_send_counted(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                const EpRouteState& state, EpRange tokens) {
  const EpCommon& c = p.c;
  const int num_choices = tokens.size() * c.shape.topk;
  const i64 base = ep_choice(c, c.rank, tokens.begin);
  const int piece = ceil_div(num_choices, role.num_warps);
  ep_count_own_choices(op, role, state, num_choices, piece);
  ep_each_choice(
      role, c.by.topk, tokens, [&](int token, int k) { return ep_own_weight(p, token, k); },
      [&](int i, float weight) {
        int choice = state.own()[i];
        if (choice >= 0) choice += state.sent(i / piece)[ep_choice_expert(choice)] << kEpRankShift;
#pragma unroll 1
        for (int r = 0; r < c.shape.num_ranks; ++r)
          *ep_words_at(op, r, c.layout.choices, base + i) = ep_word(__float_as_uint(weight), u32(choice));
      });
  role.sync();
  if (const int rank = role.thread(); rank < c.shape.num_ranks)
    ptx::store_release_sys(op.word(rank, c.layout.route_flags, c.rank * c.shape.num_ctas + int(blockIdx.x)),
                           ep_flag(op.epoch, kEpRouting, 1));
}

// By the whole role: this rank's choices, those of this CTA's tokens, to all ranks, when the other warps have seen the
// credits.
template <bool kCounted>
__device__ __forceinline__ void ep_send_routing(const EpDispatchParams& p, const EpOperation& op, const EpRole& role,
                                                const EpRouteState& state, int* failed) {
  const EpRange tokens = ep_tokens_of_cta(p.c.num_tokens, blockIdx.x, p.c.by.receivers);
  if constexpr (kCounted)
    ep_load_choices(p, role, state, tokens);
  else if (p.route)
    ep_count_choices(p, role, state, tokens);
  ptx::named_barrier_sync(kEpMaySend, 32 * kEpDispatchWarps);
  if (ep_look(*failed) != 0) return;
  ep_send_header(p, op, role);
  if constexpr (kCounted)
    ep_send_counted(p, op, role, state, tokens);
  else if (p.route)
    ep_send_choices(p, op, role, state, tokens);
}

}  // namespace phalanx
