// One description of each kernel of this room: the generator prints it, the kernel is instantiated with it, and the
// host asks it how many CTAs to launch.
#pragma once
#include "device/types.h"

namespace phalanx {

constexpr int kQuantizeBlock = 128;  // columns (and rows) that share a scale
constexpr float kE4m3Max = 448.0f;
constexpr float kMinScale = 0x1p-126f;  // smallest normal float: its reciprocal is finite

// Bits of the smallest power of two that is not below the positive normal float with these bits.
constexpr u32 pow2_ceil_bits(u32 scale_bits) { return (scale_bits + 0x007fffffu) & 0x7f800000u; }

enum class FloatType { bf16, f16, f32 };
enum class ScaleShape { row_1x128, block_128x128 };

// What is written from x [rows, cols]. `both` reads x once.
enum class QuantizeForm {
  rows,        // E4M3 [rows, cols], a scale per 1 x 128
  blocks,      // E4M3 [rows, cols], a scale per 128 x 128
  transposed,  // E4M3 [cols, rows], a scale per 1 x 128 of it
  both,        // rows and transposed
};

// A thread holds pieces of 16 bytes, of several rows; kQuantizeBlock / kCount lanes share the 128 columns of a block.
constexpr int piece_count(FloatType type) { return type == FloatType::f32 ? 4 : 8; }

// Kernels whose warps each take 32 pieces of some rows: of kMany, so that many bytes are in flight, or where all warps
// that take one are on the GPU at once, of one.
struct RowTiles {
  static constexpr int kThreads = 128, kMany = 4, kEnoughWarps = 1024;

  static constexpr int warp_cols(FloatType type) { return 32 * piece_count(type); }
  static constexpr i64 num_warps(FloatType type, i64 rows, i64 cols, int rows_per_warp) {
    return ceil_div<i64>(rows, rows_per_warp) * ceil_div<i64>(cols, warp_cols(type));
  }
  static constexpr int rows_per_warp(FloatType type, i64 rows, i64 cols) {
    return num_warps(type, rows, cols, kMany) >= kEnoughWarps ? kMany : 1;
  }
  static constexpr u32 num_ctas(FloatType type, i64 rows, i64 cols) {
    return u32(ceil_div<i64>(num_warps(type, rows, cols, rows_per_warp(type, rows, cols)), kThreads / 32));
  }
};

// Kernels whose CTAs each take a tile of 128 x 128, of which a thread holds one piece of each of 4 neighbouring rows
// (FP32: 8).
struct SquareTiles {
  static constexpr int kThreads = 512;

  static constexpr int rows_per_thread(int count) { return kQuantizeBlock * kQuantizeBlock / (kThreads * count); }
  static constexpr u32 num_ctas(i64 rows, i64 cols) {
    return u32(ceil_div<i64>(rows, kQuantizeBlock) * ceil_div<i64>(cols, kQuantizeBlock));
  }
};

// Kernels whose CTAs each take a few whole rows.
struct WholeRows {
  static constexpr int kThreads = 256, kMany = 4, kEnoughRows = 2048;

  static constexpr int rows_per_cta(i64 rows) { return rows >= kEnoughRows ? kMany : 1; }
};

struct QuantizeConfig {
  FloatType type = FloatType::bf16;  // of x
  QuantizeForm form = QuantizeForm::rows;

  constexpr int num_threads() const { return form == QuantizeForm::rows ? RowTiles::kThreads : SquareTiles::kThreads; }
  constexpr int min_ctas() const { return form == QuantizeForm::rows ? 1 : type == FloatType::f32 ? 2 : 3; }
  constexpr u32 num_ctas(i64 rows, i64 cols) const {
    return form == QuantizeForm::rows ? RowTiles::num_ctas(type, rows, cols) : SquareTiles::num_ctas(rows, cols);
  }
};

// Tiles of both ways of quantising what SwiGLU, or its gradient, gives.
struct SwigluTilesConfig {
  FloatType type = FloatType::bf16;  // of gate and up
  bool pairs = false;                // backward: a CTA has a tile of gates and the tile of their ups, or two mixed ones

  constexpr int min_ctas() const { return 2; }  // of an SM: leaves 64 registers to a thread
  constexpr int num_threads() const { return SquareTiles::kThreads; }
  // Both tiles of a pair: registers do not hold them beside what they are computed from.
  constexpr int smem_bytes() const {
    return pairs ? 2 * kQuantizeBlock * kQuantizeBlock * (16 / piece_count(type)) : 0;
  }
  // Of the gradient of x, which has twice the columns of the result.
  constexpr u32 num_backward_ctas(i64 rows, i64 cols) const {
    return SquareTiles::num_ctas(rows, pairs ? cols : 2 * cols);
  }
};

struct DequantizeConfig {
  FloatType type = FloatType::bf16;  // of the result
  ScaleShape shape = ScaleShape::row_1x128;

  constexpr int num_threads() const { return RowTiles::kThreads; }
};

struct SwigluConfig {
  FloatType type = FloatType::bf16;  // of gate and up

  constexpr int num_threads() const { return RowTiles::kThreads; }
};

struct SwigluBackwardConfig {
  FloatType type = FloatType::bf16;  // of gate and up, and of the gradients

  constexpr int num_threads() const { return WholeRows::kThreads; }
};

}  // namespace phalanx
