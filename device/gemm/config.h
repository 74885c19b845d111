// One description of a GEMM kernel, with three readers: the planner returns it, the generator prints it, the kernel is
// instantiated with it. Shared memory is laid out here and nowhere else.
#pragma once
#include "device/types.h"

namespace phalanx {

constexpr int kBlockK = 128;      // depth of a k-block: one row of the 128-byte swizzle, and one scale of A
constexpr int kScaleBlock = 128;  // a scale of B covers 128 x 128 elements
constexpr int kWarpgroup = 128;   // threads
constexpr int kMaxSmemBytes = 232448;  // that one CTA of an SM90 may use

enum class OutType { bf16, f32 };

struct GemmConfig {
  int block_m = 128, block_n = 128;  // tile of D that one CTA computes
  int num_consumers = 2;             // warpgroups that multiply; each takes block_m / num_consumers rows, 64 at a time
  int num_stages = 4;                // k-blocks in flight
  int cluster_n = 1;                 // CTAs side by side along N that share A by multicast
  int split_k = 1;                   // CTAs of a cluster that share a tile, each with a part of K
  OutType out = OutType::bf16;

  constexpr int num_waves() const { return block_m / (64 * num_consumers); }  // m64 products per consumer and k-block
  constexpr int num_threads() const { return kWarpgroup * (num_consumers + 1); }
  constexpr int cluster_size() const { return cluster_n * split_k; }

  friend constexpr bool operator==(const GemmConfig&, const GemmConfig&) = default;
};

// Byte offsets in dynamic shared memory. The operands come first: the 128-byte swizzle wants 1024-byte alignment.
struct SmemLayout {
  int a, b, d, sfa, full, empty, total;
};

constexpr SmemLayout smem_layout(const GemmConfig& c) {
  SmemLayout s{};
  s.a = 0;
  s.b = s.a + c.num_stages * c.block_m * kBlockK;
  s.d = s.b + c.num_stages * c.block_n * kBlockK;
  // D is staged as BF16 for the TMA store (FP32 goes straight from registers); split-K stages FP32 partial tiles here.
  const int d_bytes = c.split_k > 1 ? 4 * c.block_m * c.block_n : c.out == OutType::bf16 ? 2 * c.block_m * c.block_n : 0;
  s.sfa = s.d + d_bytes;
  s.full = s.sfa + c.num_stages * c.block_m * 4;
  s.empty = s.full + c.num_stages * 8;
  s.total = s.empty + c.num_stages * 8;
  return s;
}

}  // namespace phalanx
