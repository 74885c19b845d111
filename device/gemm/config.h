// One description of a GEMM kernel, with three readers: the planner returns it, the generator prints it, the kernel is
// instantiated with it. Shared memory is laid out here and nowhere else.
#pragma once
#include "device/gemm/groups.h"

namespace phalanx {

constexpr int kBlockK = 128;          // depth of a k-block: one row of the 128-byte swizzle, and one scale of A
constexpr int kBf16BlockK = 64;       // of BF16 operands: as many bytes
constexpr int kPanelRows = 64;        // rows (of M or N) in one 128-byte line of an MN-major BF16 operand
constexpr int kScaleBlock = 128;      // a scale of B covers 128 x 128 elements
constexpr int kGradientColumns = 32;  // FP32 columns in the same of a gradient's panel, of 64 rows
constexpr int kGradientPanelBytes = 64 * 128;
constexpr int kScalePartsBytes = 16;  // of a scale, where the tensor cores multiply scales: see scale_products.cuh
constexpr int kPartialPad = 8;        // floats after each row of a split-K partial tile, against bank conflicts
constexpr int kWarpgroup = 128;       // threads
constexpr int kTileSlots = 4;         // tiles of a grouped product that are known ahead; see TileRing
constexpr int kTileSlotBytes = 32;
constexpr int kMaxSmemBytes = 232448;  // that one CTA of an SM90 may use
constexpr int kSmemPerSm = 233472;     // that its CTAs share, 1024 of them for each

// What becomes of a tile: D in a type, or, of gates and ups, what SwiGLU makes of them, in E4M3
// (device/moe/gemm_swiglu.cuh).
enum class OutType { bf16, f32, swiglu };

// What a kernel multiplies: one product; rows of A in groups, each with its own B; or columns of A and B in groups,
// each with its own D, where B has a scale per row as A has: the gradients of weights.
enum class Grouping { none, rows, columns };

enum class Operand { e4m3, bf16 };
// Along which dimension an operand is contiguous: K, or its rows. E4M3 is K-major.
enum class Major { k, mn };

struct GemmConfig {
  int block_m = 128, block_n = 128;  // tile of D that one CTA computes
  int num_consumers = 2;             // warpgroups that multiply; each takes block_m / num_consumers rows, 64 at a time
  int num_stages = 4;                // k-blocks in flight
  int cluster_n = 1;                 // CTAs side by side along N that share A by multicast
  int cluster_m = 1;                 // CTAs one above the other along M that share B by multicast
  int split_k = 1;                   // CTAs of a cluster that share a tile, each with a part of K
  OutType out = OutType::bf16;
  Grouping grouping = Grouping::none;
  Operand operand = Operand::e4m3;
  Major major_a = Major::k, major_b = Major::k;

  // Fewer rows than a product has: then B's rows fill it, and consumers take k-blocks in turn (gemm_fp8_few.cuh).
  constexpr bool few_rows() const { return scaled() && block_m < 64; }
  constexpr int block_k() const { return operand == Operand::e4m3 ? kBlockK : kBf16BlockK; }
  constexpr int consumer_rows() const { return block_m / num_consumers; }
  constexpr int num_waves() const { return consumer_rows() / 64; }  // m64 products per consumer and k-block
  // Registers suffice for two partial sums: the next product runs while one is promoted. Of 128 x 128, whose two
  // consumers hide much of each other's promotion, that is no faster.
  constexpr bool overlaps() const {
    return scaled() && !grouped() && !few_rows() && num_waves() == 1 && num_consumers * block_n <= 192;
  }
  // Registers of a thread, moved between the warpgroups at the start; a lone consumer has enough.
  constexpr int consumer_registers() const { return num_consumers == 3 ? 160 : 232; }
  constexpr int producer_registers() const { return num_consumers == 3 ? 32 : 40; }
  constexpr int num_threads() const { return kWarpgroup * num_consumers + (few_rows() ? 96 : kWarpgroup); }
  // Columns of a tile that share a scale of B wherever the tile begins, and the number of scales that a tile can meet.
  constexpr int scale_group() const { return gates_and_ups() ? block_n / 2 : gcd_of(block_n, kScaleBlock); }
  constexpr int num_scales_b() const { return 1 + ceil_div(block_n - scale_group(), kScaleBlock); }
  constexpr int cluster_size() const { return cluster_n * cluster_m * split_k; }
  constexpr bool multicasts() const { return cluster_n * cluster_m > 1; }
  constexpr bool grouped() const { return grouping != Grouping::none; }
  constexpr bool scaled() const { return operand == Operand::e4m3; }
  // A tile's columns: half of them gates, then the same columns of the ups, N / 2 rows further down in B.
  constexpr bool gates_and_ups() const { return out == OutType::swiglu; }
  constexpr bool scales_b_by_row() const { return scaled() && grouping == Grouping::columns; }
  // Of a stage, the parts of A's and of B's scales, if the tensor cores multiply them.
  constexpr int parts_pitch() const { return scales_b_by_row() ? (block_m + block_n) * kScalePartsBytes : 0; }
  // Panels of a gradient, of each consumer: its tile's, and those in shared memory: all of them, or as many as the wider
  // operands of BF16 leave room for.
  constexpr int panels_of_tile() const { return num_waves() * block_n / kGradientColumns; }
  constexpr int num_panels() const { return scaled() ? panels_of_tile() : 2; }
  // Rows of A that one request of a group's last tile brings: only those that have rows are made, if A is not shared.
  constexpr int rows_of_request() const {
    return grouping != Grouping::rows || cluster_n > 1 ? block_m / cluster_n : block_m > 64 ? 64 : 16;
  }
  constexpr bool slices_last_rows() const { return rows_of_request() < block_m / cluster_n; }
  // Tiles so low that a group may have one along M, so that its weights are read once. Groups' taller ones were never
  // tried with what follows from it.
  constexpr bool may_read_b_once() const {
    return grouping == Grouping::none || (grouping == Grouping::rows && block_m <= 128);
  }
  constexpr int rows_of_request_b() const { return gates_and_ups() ? block_n / 2 : block_n / cluster_m; }
  // Scales of A that TMA brings for a stage. It wants 16-byte aligned addresses, and a group may begin at any row: it
  // starts up to three rows early. A box has at most 256 of them, so the tallest tile has a box for each consumer.
  constexpr int scales_a_boxes() const { return grouping == Grouping::rows && block_m > 252 ? num_consumers : 1; }
  constexpr int scales_a_box() const { return block_m / scales_a_boxes() + (grouping == Grouping::rows ? 4 : 0); }
  constexpr int scales_a_box_pitch() const { return ceil_div(scales_a_box(), 32) * 32; }  // 128 bytes, as TMA wants
  constexpr int scales_a_pitch() const { return scales_a_boxes() * scales_a_box_pitch(); }
  // Where in a stage the scale of a tile's row lies.
  constexpr int scale_a_index(int row) const {
    const int rows = block_m / scales_a_boxes();
    return row / rows * scales_a_box_pitch() + row % rows;
  }
  // BF16 tiles leave through shared memory by TMA; FP32, narrow and split-K tiles straight from registers.
  constexpr bool stores_by_tma() const {
    return out == OutType::bf16 && split_k == 1 && block_n % 32 == 0 && block_n >= 64 && !few_rows();
  }
  // Of a panel of a staged tile, which TMA stores at once: rows of 128 bytes, or of 64 where the tile's width leaves a
  // half.
  constexpr int panel_columns() const { return block_n % 64 == 0 ? 64 : 32; }
  // Few rows: sums of one column of D in shared memory, in floats; the padding keeps columns in different banks.
  constexpr int column_pitch() const { return block_m + 2; }

  friend constexpr bool operator==(const GemmConfig&, const GemmConfig&) = default;
};

// Byte offsets in dynamic shared memory. The operands come first: the 128-byte swizzle wants 1024-byte alignment.
struct SmemLayout {
  int a, b, d, sfa, sfb, parts, zeros, groups, tiles, full, empty, sfa_empty, c_full, tile_full, tile_empty, a_full,
      begun, maxima, maxima_full, scales_full, total;
};

constexpr SmemLayout smem_layout(const GemmConfig& c) {
  SmemLayout s{};
  s.a = 0;
  s.b = s.a + c.num_stages * c.block_m * kBlockK;
  s.d = s.b + c.num_stages * c.block_n * kBlockK;
  const int d_bytes = c.grouping == Grouping::columns ? c.num_consumers * c.num_panels() * kGradientPanelBytes
                      : c.few_rows()                  ? 4 * c.num_consumers * c.block_n * c.column_pitch()
                      : c.split_k > 1                 ? 4 * c.block_m * (c.block_n + kPartialPad)
                      : c.stores_by_tma()             ? 2 * c.block_m * c.block_n
                                                      : 0;
  s.sfa = s.d + d_bytes;
  s.sfb = s.sfa + (c.scaled() ? c.num_stages * c.scales_a_pitch() * 4 : 0);
  s.parts = s.sfb + (c.scales_b_by_row() ? c.num_stages * c.block_n * 4 : 0);
  s.zeros = s.parts + c.num_stages * c.parts_pitch();
  s.groups = s.zeros + (c.scales_b_by_row() ? c.block_n * kScalePartsBytes : 0);
  s.tiles = s.groups + (c.grouped() ? (kMaxTableGroups + 1) * int(sizeof(GroupEntry)) : 0);
  s.tiles = ceil_div(s.tiles, 32) * 32;
  s.full = s.tiles + (c.grouped() ? kTileSlots * kTileSlotBytes : 0);
  s.empty = s.full + c.num_stages * 8;
  s.sfa_empty = s.empty + c.num_stages * 8;
  s.c_full = s.sfa_empty + c.num_stages * 8;
  s.tile_full = s.c_full + c.num_consumers * 8;
  s.tile_empty = s.tile_full + (c.grouped() ? kTileSlots * 8 : 0);
  s.a_full = s.tile_empty + (c.grouped() ? kTileSlots * 8 : 0);
  s.begun = s.a_full + (c.few_rows() ? c.num_stages * 8 : 0);
  s.maxima = s.begun + (c.few_rows() ? 8 : 0);
  s.maxima_full = s.maxima + (c.gates_and_ups() ? 2 * c.block_m * 4 : 0);
  s.scales_full = s.maxima_full + (c.gates_and_ups() ? 4 * c.num_consumers * 8 : 0);
  s.total = s.scales_full + (c.scales_b_by_row() ? c.num_stages * 8 : 0);
  return s;
}

// Shared memory with which two CTAs fit on an SM.
constexpr int kHalfOfSmem = kSmemPerSm / 2 - 1024;

// That a kernel's registers must suffice for, and that a plan may count on if all SMs are free.
constexpr int ctas_per_sm(const GemmConfig& c) {
  const bool small = c.num_consumers == 1 && c.scaled() && !c.grouped() && c.split_k == 1;
  return (c.few_rows() || small) && smem_layout(c).total <= kHalfOfSmem ? 2 : 1;
}

// Whether the kernel can be instantiated; the planner and the tests ask, the kernel asserts.
constexpr bool is_valid(const GemmConfig& c) {
  constexpr int kMostStages = 64;  // sizes of memory fit 32 bits
  if (c.num_consumers < 1 || c.cluster_n < 1 || c.cluster_m < 1 || c.split_k < 1 || c.num_stages > kMostStages)
    return false;
  const bool few_rows = (c.block_m == 8 || c.block_m == 16) && c.block_n == 64 && c.num_stages % c.num_consumers == 0 &&
                        !c.multicasts() && !c.grouped();
  const bool tile = c.num_consumers <= 3 && c.num_waves() >= 1 && c.num_waves() <= 2 &&
                    c.block_m == 64 * c.num_waves() * c.num_consumers && c.block_n >= 16 && c.num_scales_b() <= 2;
  const bool waves = !c.scales_b_by_row() || c.num_waves() == 1;  // registers for each value's product of scales
  const int one_kind = (c.cluster_n > 1) + (c.cluster_m > 1) + (c.split_k > 1);
  const bool cluster = one_kind <= 1 && c.cluster_size() <= 8 && c.block_m % (8 * c.cluster_n) == 0 &&
                       c.block_n % (8 * c.cluster_m) == 0;
  // An MN-major operand comes in panels of 64 rows.
  const bool majors = (c.major_a == Major::k || c.block_m / c.cluster_n % kPanelRows == 0) &&
                      (c.major_b == Major::k || c.block_n / c.cluster_m % kPanelRows == 0) &&
                      (!c.scaled() || (c.major_a == Major::k && c.major_b == Major::k));
  // Two CTAs have the columns of a scale of the result.
  const bool swiglu = !c.gates_and_ups() || (c.grouping == Grouping::rows && c.scaled() && c.num_waves() == 1 &&
                                             c.block_n == kScaleBlock && c.cluster_n == 2);
  return (c.few_rows() ? few_rows : tile) && waves && cluster && majors && swiglu && c.num_stages >= 2 &&
         smem_layout(c).total <= kMaxSmemBytes;
}

}  // namespace phalanx
