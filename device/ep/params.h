// What the host passes to the expert-parallel kernels, and to the CPU backend. Strides are in elements.
#pragma once
#include "device/ep/layout.h"

namespace phalanx {

// Where a wait stands; also the index of its name in messages.
enum EpPhase : int {
  kEpPhaseNone,
  kEpPhaseDispatchCredit,  // the peer has not finished reading this rank's slots of an earlier dispatch
  kEpPhaseRouting,         // the peer's topk_idx
  kEpPhaseTokens,          // the peer's tokens
  kEpPhaseCombineCredit,
  kEpPhaseSums,  // the peer's sums
};

enum EpState : int { kEpOk, kEpTimeout, kEpMismatch, kEpAborted, kEpOtherTokens, kEpSendUnderWay };

// The first wait that failed, or what else did (another number of tokens than the handle's, a whole operation between
// the halves of another), and the last overflow, left in memory of the host.
struct EpStatus {
  int state;
  int peer, phase, aborter;
  u64 epoch, expected, seen;
  int rows_needed, rows_given;  // needed > 0: a dispatch had more rows than room
};

// What kernels divide by.
struct EpDivisors {
  Divisor ctas, receivers, topk, local_experts, max_tokens;
  Divisor groups;  // of warps that route: each sees to other sources

  constexpr EpDivisors() = default;
  constexpr EpDivisors(const EpShape& s, int num_local_experts)
      : ctas(s.num_ctas),
        receivers(ep_num_receivers(s)),
        topk(s.topk),
        local_experts(num_local_experts),
        max_tokens(s.max_tokens > 0 ? s.max_tokens : 1),
        groups(min_of(s.num_ranks, kEpRouteWarps)) {}
};

// Of both operations.
struct EpCommon {
  u8* peers[kEpMaxRanks];             // every rank's symmetric buffer, as this rank reaches it
  int first_expert[kEpMaxRanks + 1];  // of each rank
  EpShape shape;
  EpDivisors by;
  EpLayout layout;
  EpHandleLayout handle_layout;
  EpStatus* status;
  u64 timeout_ns;
  int rank;
  int num_tokens;  // of this rank
  int* handle;
  int send, recv;  // which halves
};

constexpr int ep_num_local_experts(const EpCommon& c) { return c.first_expert[c.rank + 1] - c.first_expert[c.rank]; }

struct EpDispatchParams {
  EpCommon c;
  EpRouteSmem smem;
  int route;  // exchange topk_idx and fill the handle; else the handle is given
  int copy;   // move tokens

  const void* x;  // [T, H] of `x_format`
  const float* x_scales;
  i64 x_stride, x_scale_stride_row, x_scale_stride_col;
  EpFormat x_format, format;  // BF16 may be sent as E4M3
  EpFormat sent;              // what headers and flags say: all ranks should send the same

  const void* topk_idx;       // [T, K] int32 or int64
  const float* topk_weights;  // [T, K], or null: all 1
  i64 idx_stride, weights_stride;
  int idx_is_64;

  void* rows;          // [capacity, H] of `format`
  float* row_scales;   // [capacity, ceil(H / 128)], MN-major
  float* row_weights;  // [capacity], or null
  int* offsets;        // [local experts + 1], or null: the first row of each
  int* counts;         // [local experts], or null: rows without padding
  i64 row_stride, row_scale_stride;
  int capacity;
  Divisor alignment;  // of offsets
  int pow2_scales;
};

struct EpCombineParams {
  EpCommon c;
  const void* rows;  // [capacity, H] BF16
  int capacity;
  void* out;  // [T, H] BF16
  const void* residual;
  int values;               // row_values go home with the sums
  const float* row_values;  // [capacity]
  float* topk_values;       // [T, K]
  i64 row_stride, out_stride, residual_stride;
  int weighted;
};

}  // namespace phalanx
