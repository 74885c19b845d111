// Tile schedulers: which output tile does this CTA compute next? One struct per grouping, one interface: next(). Pure
// functions of (cta, num_ctas, shape), so that the host proves that every tile is visited exactly once.
#pragma once
#include "device/gemm/config.h"

namespace phalanx {

struct Tile {
  int m, n;                            // its first row and column
  int group = 0;                       // of a grouped product; a tile lies in one group
  int group_begin = 0, group_end = 0;  // rows of D, or columns of K, that the group has
};

// Tiles of a tiles_m x tiles_n rectangle are walked in bands of `group_m` along M, M fastest: the CTAs that run at the
// same time then form a block of D whose operands fit in L2.
struct TilePosition {
  int m, n;
};
constexpr TilePosition walk_tiles(int index, int tiles_m, int tiles_n, int group_m) {
  const int band = tiles_m <= group_m ? 0 : index / (group_m * tiles_n), first_m = band * group_m;
  const int rows = min_of(group_m, tiles_m - first_m), i = index - first_m * tiles_n;
  return {first_m + i % rows, i / rows};
}

// What all schedulers share: the cluster tile, and this CTA's place in it. CTAs of a cluster walk the same sequence of
// cluster tiles. They differ in their column (cluster_n), their row (cluster_m) or their part of K (split_k), so they
// always agree on what they share by multicast. The cluster tile may reach past M or N.
struct ClusterTiles {
  int height, width;  // of a cluster tile
  int tiles_n;        // cluster tiles along N
  int group_m;
  int index, step;  // the next tile of this cluster, and from there to the one after it
  int row, column;  // of this CTA inside the cluster tile

  constexpr ClusterTiles(const GemmConfig& c, int n, int group_m_, int cta, int num_ctas)
      : height(c.block_m * c.cluster_m),
        width(c.block_n * c.cluster_n),
        tiles_n(ceil_div(n, width)),
        group_m(group_m_),
        index(cta / c.cluster_size()),
        step(num_ctas / c.cluster_size()),
        row(cta % c.cluster_m * c.block_m),
        column(cta % c.cluster_n * c.block_n) {}

  // This CTA's tile of a cluster tile.
  constexpr Tile tile_at(const TilePosition& at) const { return {at.m * height + row, at.n * width + column}; }
};

// A division costs a tile's worth of a product of few k-blocks; hence the running position, and shifts in whole bands.
struct DenseTiles : ClusterTiles {  // `index` counts from the band's first tile
  int tiles_m, first_m;             // cluster tiles along M, and of those the present band's first
  int group_shift, left;            // tiles from the next one on, of all clusters

  // `group_m` is a power of two.
  constexpr DenseTiles(const GemmConfig& c, int m, int n, int group_m_, int cta, int num_ctas)
      : ClusterTiles(c, n, group_m_, cta, num_ctas),
        tiles_m(ceil_div(m, height)),
        first_m(0),
        group_shift(log2_of(group_m_)),
        left(tiles_m * tiles_n - index) {}

  constexpr int count() const { return tiles_m * tiles_n; }

  constexpr bool next(Tile& t) {
    if (left <= 0) return false;
    left -= step;
    int rows = min_of(group_m, tiles_m - first_m);
    while (index >= rows * tiles_n) {
      index -= rows * tiles_n;
      first_m += group_m;
      rows = min_of(group_m, tiles_m - first_m);
    }
    const int n = rows == group_m ? index >> group_shift : int(unsigned(index) / unsigned(rows));
    t = tile_at({first_m + index - n * rows, n});
    index += step;
    return true;
  }
};

// The k-blocks of one CTA out of those that share a tile.
struct KRange {
  int begin, end;
};
constexpr KRange k_range(int k, int split_k, int part, int block_k = kBlockK) {
  const int num_k_blocks = ceil_div(k, block_k);
  return {num_k_blocks * part / split_k, num_k_blocks * (part + 1) / split_k};
}

}  // namespace phalanx
