// Tile schedulers over groups, of the same interface as DenseTiles: pure functions of (cta, num_ctas, table of groups). The
// tiles of all groups form one row, dealt out in turn, so no group waits for another and none has CTAs of its own.
#pragma once
#include "device/gemm/groups.h"
#include "device/gemm/tiles.h"

namespace phalanx {

// Groups of rows. The table holds those that have any, in ascending order of `first_tile`, and one more entry whose
// first_tile is the number of all cluster tiles. A tile begins at its group's first row or a multiple of the tile's height
// after it; the last of a group may reach past the group's end.
struct GroupedTiles {
  const GroupEntry* entry;  // the group of the last tile
  int height, width;        // of a cluster tile
  int tiles_n;              // cluster tiles along N
  int group_m, index, step, count;
  int row, column;  // of this CTA inside the cluster tile

  constexpr GroupedTiles(const GemmConfig& c, const GroupEntry* table, int count_, int n, int group_m_, int cta,
                         int num_ctas)
      : entry(table),
        height(c.block_m * c.cluster_m),
        width(c.block_n * c.cluster_n),
        tiles_n(ceil_div(n, width)),
        group_m(group_m_),
        index(cta / c.cluster_size()),
        step(num_ctas / c.cluster_size()),
        count(count_),
        row(cta % c.cluster_m * c.block_m),
        column(cta % c.cluster_n * c.block_n) {}

  constexpr bool next(Tile& t) {
    if (index >= count) return false;
    while (index >= entry[1].first_tile) ++entry;
    const TilePosition at =
        walk_tiles(index - entry->first_tile, ceil_div(entry->end - entry->begin, height), tiles_n, group_m);
    t = {entry->begin + at.m * height + row, at.n * width + column, entry->group, entry->begin, entry->end};
    index += step;
    return true;
  }
};

// Groups of columns of K: every group has all tiles of D [M, N], and sums its own columns. The table holds every group.
struct ColumnGroupTiles {
  const GroupEntry* table;
  int num_groups, height, width;  // of a cluster tile
  int tiles_m, tiles_n;           // cluster tiles of one group
  int group_m, index, step;
  int row, column;  // of this CTA inside the cluster tile

  constexpr ColumnGroupTiles(const GemmConfig& c, const GroupEntry* table_, int num_groups_, int m, int n, int group_m_,
                             int cta, int num_ctas)
      : table(table_),
        num_groups(num_groups_),
        height(c.block_m * c.cluster_m),
        width(c.block_n * c.cluster_n),
        tiles_m(ceil_div(m, height)),
        tiles_n(ceil_div(n, width)),
        group_m(group_m_),
        index(cta / c.cluster_size()),
        step(num_ctas / c.cluster_size()),
        row(cta % c.cluster_m * c.block_m),
        column(cta % c.cluster_n * c.block_n) {}

  constexpr bool next(Tile& t) {
    const int per_group = tiles_m * tiles_n, group = index / per_group;
    if (group >= num_groups) return false;
    const TilePosition at = walk_tiles(index - group * per_group, tiles_m, tiles_n, group_m);
    t = {at.m * height + row, at.n * width + column, group, table[group].begin, table[group].end};
    index += step;
    return true;
  }
};

// The k-blocks of a group of columns: those that it touches.
constexpr KRange k_range(const Tile& t) {
  return {t.group_begin / kBlockK,
          t.group_begin < t.group_end ? ceil_div(t.group_end, kBlockK) : t.group_begin / kBlockK};
}

}  // namespace phalanx
