// From a tile of a group to places in the tensor maps.
#pragma once
#include "device/gemm/params.h"
#include "device/gemm/tiles.h"

namespace phalanx {

// Where a tile's operands lie in the stacks that tensor maps show as one matrix.
struct TileOrigin {
  int a, b, d;         // rows
  int sfa_row, sfa_k;  // of A's scales

  // How many scales lie before the tile's own in a stage.
  __device__ int sfa_shift() const { return sfa_row % 4; }
};
template <GemmConfig C>
__device__ TileOrigin origin_of(const GemmParams& p, const Tile& t) {
  const GroupParams& g = p.groups;
  if constexpr (C.grouping == Grouping::rows)
    return {t.m + t.group * g.a_pitch, t.n + t.group * g.b_pitch, t.m + t.group * g.d_pitch,
            t.m + t.group * g.sfa_pitch_x, t.group * g.sfa_pitch_y};
  else if constexpr (C.grouping == Grouping::columns)
    return {t.m, t.n, t.m + t.group * g.d_pitch, t.m, 0};
  else
    return {t.m, t.n, t.m, t.m, 0};
}

// Where the tile's rows of A end.
template <GemmConfig C>
__device__ int end_of_rows(const GemmParams& p, const Tile& t) {
  return C.grouping == Grouping::rows ? t.group_end : p.m;
}

// The tile in D's coordinates, its group_end the end of the rows that it may write.
template <GemmConfig C>
__device__ Tile output_tile(const GemmParams& p, const Tile& t) {
  if constexpr (!C.grouped()) return t;
  const int row = origin_of<C>(p, t).d;
  return {row, t.n, t.group, 0, end_of_rows<C>(p, t) + row - t.m};
}

}  // namespace phalanx
