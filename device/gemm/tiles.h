// Tile schedulers: which output tile does this CTA compute next? One struct per grouping, one interface: next(). Pure
// functions of (cta, num_ctas, shape), so that the host proves that every tile is visited exactly once.
#pragma once
#include "device/gemm/config.h"

namespace phalanx {

struct Tile {
  int m, n;  // its first row and column
};

// CTAs of a cluster walk the same sequence of cluster tiles. They differ in their column (cluster_n), their row (cluster_m) or
// their part of K (split_k), so they always agree on what they share by multicast. The cluster tile may reach past M or N.
//
// Tiles are walked in groups of `group_m` along M, M fastest: the CTAs that run at the same time then form a block of D
// whose operands fit in L2.
struct DenseTiles {
  int height, width;     // of a cluster tile
  int tiles_m, tiles_n;  // cluster tiles
  int group_m, index, step;
  int row, column;  // of this CTA inside the cluster tile

  constexpr DenseTiles(const GemmConfig& c, int m, int n, int group_m_, int cta, int num_ctas)
      : height(c.block_m * c.cluster_m),
        width(c.block_n * c.cluster_n),
        tiles_m(ceil_div(m, height)),
        tiles_n(ceil_div(n, width)),
        group_m(group_m_),
        index(cta / c.cluster_size()),
        step(num_ctas / c.cluster_size()),
        row(cta % c.cluster_m * c.block_m),
        column(cta % c.cluster_n * c.block_n) {}

  constexpr int count() const { return tiles_m * tiles_n; }

  constexpr bool next(Tile& t) {
    if (index >= count()) return false;
    const int group = index / (group_m * tiles_n), first_m = group * group_m;
    const int rows = min_of(group_m, tiles_m - first_m), i = index - first_m * tiles_n;
    t = {(first_m + i % rows) * height + row, i / rows * width + column};
    index += step;
    return true;
  }
};

// The k-blocks of one CTA out of those that share a tile.
struct KRange {
  int begin, end;
};
constexpr KRange k_range(int k, int split_k, int part) {
  const int num_k_blocks = ceil_div(k, kBlockK);
  return {num_k_blocks * part / split_k, num_k_blocks * (part + 1) / split_k};
}

}  // namespace phalanx
