// Tile schedulers over groups, of the same interface as DenseTiles: pure functions of (cta, num_ctas, table of groups).
// The tiles of all groups form one row, dealt out in turn, so no group waits for another and none has CTAs of its own.
#pragma once
#include "device/gemm/groups.h"
#include "device/gemm/tiles.h"

namespace phalanx {

// The next round of tiles, one a cluster, is dealt from one place further on: else tiles that repeat with a period of
// the clusters' number, such as every second that is partly empty, would always meet the same clusters.
struct DealtTiles : ClusterTiles {
  int place;  // in the round

  constexpr DealtTiles(const GemmConfig& c, int n, int group_m_, int cta, int num_ctas)
      : ClusterTiles(c, n, group_m_, cta, num_ctas), place(index) {}

  constexpr void deal() {
    index += step + 1;
    if (++place == step) place = 0, index -= step;
  }
};

// Groups of rows. The table holds those that have any, in ascending order of `first_tile`, and one more entry whose
// first_tile is the number of all cluster tiles. A tile begins at its group's first row or a multiple of the tile's
// height after it; the last of a group may reach past the group's end.
struct GroupedTiles : DealtTiles {
  const GroupEntry* entry;  // the group of the last tile
  int count;

  constexpr GroupedTiles(const GemmConfig& c, const GroupEntry* table, int count_, int n, int group_m_, int cta,
                         int num_ctas)
      : DealtTiles(c, n, group_m_, cta, num_ctas), entry(table), count(count_) {}

  constexpr bool next(Tile& t) {
    if (index >= count) return false;
    while (index >= entry[1].first_tile) ++entry;
    t = tile_at(walk_tiles(index - entry->first_tile, ceil_div(entry->end - entry->begin, height), tiles_n, group_m));
    t.m += entry->begin;
    t.group = entry->group, t.group_begin = entry->begin, t.group_end = entry->end;
    deal();
    return true;
  }
};

// Groups of columns of K: every group has all tiles of D [M, N], and sums its own columns. The table holds every group.
struct ColumnGroupTiles : DealtTiles {
  const GroupEntry* table;
  int num_groups, tiles_m;  // cluster tiles along M

  constexpr ColumnGroupTiles(const GemmConfig& c, const GroupEntry* table_, int num_groups_, int m, int n, int group_m_,
                             int cta, int num_ctas)
      : DealtTiles(c, n, group_m_, cta, num_ctas),
        table(table_),
        num_groups(num_groups_),
        tiles_m(ceil_div(m, height)) {}

  constexpr bool next(Tile& t) {
    const int per_group = tiles_m * tiles_n, group = index / per_group;
    if (group >= num_groups) return false;
    t = tile_at(walk_tiles(index - group * per_group, tiles_m, tiles_n, group_m));
    t.group = group, t.group_begin = table[group].begin, t.group_end = table[group].end;
    deal();
    return true;
  }
};

// The k-blocks of a group of columns: those that it touches.
constexpr KRange k_range(const Tile& t) {
  return {t.group_begin / kBlockK,
          t.group_begin < t.group_end ? ceil_div(t.group_end, kBlockK) : t.group_begin / kBlockK};
}

}  // namespace phalanx
