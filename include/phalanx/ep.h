// Expert parallelism: tokens go to the ranks that hold their experts, and come back summed. docs/expert_parallel.md has
// the protocol, docs/adr/0006-expert-parallel.md the reasons.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "phalanx/export.h"
#include "phalanx/group.h"
#include "phalanx/status.h"
#include "phalanx/stream.h"
#include "phalanx/tensor.h"

namespace phalanx {

/// The same on every rank; construction compares.
struct ExpertParallelConfig {
  int hidden = 0;             ///< H: its rows are a multiple of 16 bytes
  int num_experts = 0;        ///< E, of all ranks; rank r holds neighbouring ones
  int topk = 0;               ///< K, 1 to 32
  int max_tokens = 0;         ///< of any rank in any call
  DType dtype = DType::e4m3;  ///< the widest that dispatch sends: e4m3 (half the memory) or bf16
  bool latency = false;       ///< few tokens: two buffers in turn, tokens spread over all warps; else throughput
  int num_sms = 0;            ///< SMs of a call; 0: 32 for throughput, 128 for latency (the CPU uses one thread a rank)
  int alignment = 1;          ///< each expert's rows begin at a multiple of this
  std::vector<int> experts_per_rank{};  ///< empty: as even as can be, the first ranks one more
};

/// Bytes of symmetric memory on each rank with a GPU, to within 4 KB and, per SM and rank, 96 bytes and 8 B for each
/// expert of a rank
///
///     B * ((R - 1) * T * (slot + 2 H + 4 K) + R T (16 K + 4 ceil(H / 128))) + 8 R T P
///
/// where B = 2 for latency, else 1; slot = H for e4m3, 2 H for bf16; 4 K and 4 ceil(H / 128) are rounded up to 16; P,
/// the pieces of a token, 8 at most for latency, else 1; and T = max_tokens. Where T K is at most the SMs times the
/// experts of a rank, and where a CTA's shared memory cannot hold its counts (with more than 4096 experts, or thousands
/// and few SMs), P is 0, B T slot come on top, and for bf16 there is no 4 ceil(H / 128).
///
/// @throws Error invalid_argument, also where the SMs are too few for the tokens
PHALANX_API std::size_t expert_parallel_bytes(const ExpertParallelConfig& config, int num_ranks);

/// Both halves of an operation, or one of them: send returns at once, recv waits for the peers. Up to two sends may be
/// under way (throughput: one) before a peer receives the first, but no whole operation of the same kind: that is an
/// error. What recv reads (x, rows, handle) must not change in between.
enum class EpPart { both, send, recv };

struct EpDispatch {
  Tensor x;  ///< [T, H] BF16, or E4M3 with x_scales, the same on all ranks; T <= max_tokens may differ between them
  std::optional<Tensor> x_scales;  ///< FP32 [T, ceil(H / 128)], any strides
  std::optional<Tensor>
      topk_idx;  ///< int32 or int64 [T, K], rows contiguous; outside [0, E): none. Absent: as the handle says
  std::optional<Tensor> topk_weights;  ///< FP32 [T, K]; absent: 1
  Tensor handle;                      ///< int32 [handle_words()], contiguous: written, or read where topk_idx is absent
  Tensor rows;                        ///< [capacity, H] BF16 or E4M3 (BF16 x is quantised on the way, for
                                      ///< each place: with many tokens call quantize before)
  std::optional<Tensor> row_scales;   ///< FP32 [capacity, ceil(H / 128)], MN-major, with E4M3 rows
  std::optional<Tensor> row_weights;  ///< FP32 [capacity]: topk_weights of each row, 0 for padding
  std::optional<Tensor> offsets;      ///< int32 [local experts + 1]: where each expert's rows begin, and the end
  std::optional<Tensor> counts;       ///< int32 [local experts]: rows without padding
  bool pow2_scales = false;
  EpPart part = EpPart::both;
  Stream stream{};
};

struct EpCombine {
  Tensor rows;                     ///< BF16 [capacity, H]
  Tensor handle;                   ///< of the dispatch
  Tensor out;                      ///< BF16 [T, H], T the tokens of the dispatch
  std::optional<Tensor> residual;  ///< BF16 [T, H], added; may be `out`
  bool weighted = true;            ///< by topk_weights; else by 1 (the backward of dispatch)
  std::optional<Tensor>
      row_values;  ///< FP32 [capacity]: one number a row, taken home as they are (gradients of weights)
  std::optional<Tensor> topk_values;  ///< FP32 [T, K]: where they go; 0 where there is no row. With row_values
  EpPart part = EpPart::both;
  Stream stream{};
};

/// Expert parallelism over a group. Every rank makes the same calls in the same order, on one stream at a time (or on
/// streams that the caller orders). On CUDA all calls but `route` + `num_rows` enqueue work and return; nothing is
/// allocated, compiled (after the first call) or waited for, so that they can be captured in CUDA graphs, replayed in
/// any order that is the same on all ranks.
///
/// Rows are sorted by (local expert, source rank, source token). Same routing, same bits.
///
/// Before it is destroyed all ranks wait for their streams, and then for each other by Group::barrier: peers' last
/// kernels may still write to this rank's memory, which between processes is freed at once, of local groups with the
/// last rank's ExpertParallel.
class PHALANX_API ExpertParallel {
 public:
  /// Collective: allocates the symmetric memory and compares the configurations.
  /// @throws Error invalid_argument (naming the rank and field that differ), unsupported, timeout
  ExpertParallel(const Group& group, const ExpertParallelConfig& config);
  ~ExpertParallel();
  ExpertParallel(ExpertParallel&&) noexcept;
  ExpertParallel& operator=(ExpertParallel&&) noexcept;

  const ExpertParallelConfig& config() const;
  const Group& group() const;
  int first_local_expert() const;
  int num_local_experts() const;
  std::int64_t handle_words() const;
  /// Rows that no routing can exceed: the capacity that never overflows.
  std::int64_t max_rows() const;

  /// Exchanges the routing alone, for capacities that fit exactly: fills handle, and offsets and counts where given. A
  /// dispatch without topk_idx follows. `x`, `rows` and what belongs to them are not used.
  void route(const EpDispatch& args);
  /// Rows of a routing, padding included. Waits for the stream.
  std::int64_t num_rows(const Tensor& handle, Stream stream = {});

  /// Tokens to their experts' rows. Rows that exceed the capacity are not written; the handle knows how many were
  /// needed, and on the CPU, or at the next call on CUDA, Error capacity_exceeded says so. Padding rows are zeros with
  /// scale 1; rows from offsets[local experts] on are left as they were. Rows are x to the bit, but that with few
  /// tokens on CUDA a NaN may lose its sign.
  ///
  /// @throws Error of earlier operations (timeout, aborted, capacity_exceeded); of arguments, before anything is
  /// enqueued
  void dispatch(const EpDispatch& args);

  /// out[t] = sum over ranks, this one first, then the others in order, of the sum over its choices k in order of
  /// weight[t, k] * row, + residual[t]. Each rank sums in FP32 by FMA; other ranks' sums are rounded to BF16 for the
  /// way, and the total once more.
  void combine(const EpCombine& args);

  /// Throws what went wrong in operations that have finished on the device: call it after waiting for the stream.
  void check();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace phalanx
