// The tile schedulers over groups, proven by brute force on the host: over random group sizes every tile of every group
// is computed by exactly one CTA, the CTAs of a cluster agree on what they share, and no tile crosses into another
// group.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "device/gemm/grouped_tiles.h"

namespace phalanx {
namespace {

constexpr int kRandomCases = 4000;

const GemmConfig kConfigs[] = {
    {.block_m = 256, .block_n = 128, .num_stages = 3, .cluster_n = 2},
    {.block_m = 128, .block_n = 192, .cluster_m = 2},
    {.block_m = 128, .block_n = 128, .cluster_n = 2},
    {.block_m = 128, .block_n = 128},
    {.block_m = 64, .block_n = 64, .num_consumers = 1},
};

// What a CTA's table must be, made the obvious way.
struct Table {
  std::vector<GroupEntry> entries;
  int num_tiles = 0;

  Table(const GemmConfig& c, const std::vector<std::pair<int, int>>& ranges, int n) {
    for (std::size_t g = 0; g < ranges.size(); ++g) {
      const auto [begin, end] = ranges[g];
      if (begin == end) continue;
      entries.push_back({int(g), begin, end, num_tiles});
      num_tiles += ceil_div(end - begin, c.block_m * c.cluster_m) * ceil_div(n, c.block_n * c.cluster_n);
    }
    entries.push_back({0, 0, 0, num_tiles});
  }
};

class Random {
 public:
  explicit Random(unsigned seed) : rng_(seed) {}
  int between(int low, int high) { return std::uniform_int_distribution(low, high)(rng_); }

  /// One of the shapes that groups take: uniform, many empty, one that has all, all on the last, none at all.
  std::vector<int> sizes(int num_groups) {
    std::vector<int> sizes(num_groups);
    const int kind = between(0, 5), one = kind == 3 ? num_groups - 1 : between(0, num_groups - 1);
    for (int g = 0; g < num_groups; ++g) {
      if (kind <= 1) sizes[g] = between(0, 400);
      if (kind == 2) sizes[g] = between(0, 3) ? 0 : between(0, 100);
      if (kind == 3 || kind == 4) sizes[g] = g == one ? between(1, 3000) : 0;
    }
    return sizes;
  }

 private:
  std::mt19937 rng_;
};

template <class Scheduler>
std::vector<Tile> tiles_of(Scheduler scheduler) {
  std::vector<Tile> tiles;
  for (Tile t; scheduler.next(t);) tiles.push_back(t);
  return tiles;
}

// (group, row, column) -> how many CTAs compute the tile there.
using Visits = std::map<std::tuple<int, int, int>, int>;

/// `make(cta)` gives a CTA's scheduler.
template <class Make>
void walk_grid(const GemmConfig& c, int clusters, Make make, const std::function<void(const Tile&)>& visit) {
  for (int cluster = 0; cluster < clusters; ++cluster) {
    const std::vector<Tile> leader = tiles_of(make(cluster * c.cluster_size()));
    for (int rank = 0; rank < c.cluster_size(); ++rank) {
      const std::vector<Tile> tiles = tiles_of(make(cluster * c.cluster_size() + rank));
      ASSERT_EQ(tiles.size(), leader.size()) << "peers of a cluster take as many steps";
      for (std::size_t i = 0; i < tiles.size(); ++i) {
        ASSERT_EQ(tiles[i].group, leader[i].group) << "peers work on one group";
        ASSERT_EQ(tiles[i].m, leader[i].m + rank % c.cluster_m * c.block_m) << "peers share rows of A or";
        ASSERT_EQ(tiles[i].n, leader[i].n + rank % c.cluster_n * c.block_n) << "columns of B";
        visit(tiles[i]);
      }
    }
  }
}

TEST(GroupedTiles, EveryTileOfEveryGroupOnce) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  Random random(seed);
  for (int i = 0; i < kRandomCases; ++i) {
    const GemmConfig& c = kConfigs[random.between(0, std::size(kConfigs) - 1)];
    const std::vector<int> sizes = random.sizes(random.between(1, 40));
    std::vector<std::pair<int, int>> ranges;
    int row = random.between(0, 50);
    for (const int size : sizes) {
      ranges.push_back({row, row + size});
      row += size + (i % 2 ? random.between(0, 9) : 0);  // rows of no group between
    }
    const int n = random.between(1, 1500), clusters = random.between(1, 140), group_m = random.between(1, 10);
    const Table table(c, ranges, n);
    Visits visits;
    walk_grid(
        c, clusters,
        [&](int cta) {
          return GroupedTiles(c, table.entries.data(), table.num_tiles, n, group_m, cta, clusters * c.cluster_size());
        },
        [&](const Tile& t) {
          const auto [begin, end] = ranges[t.group];
          ASSERT_EQ(t.group_begin, begin);
          ASSERT_EQ(t.group_end, end);
          ASSERT_EQ((t.m - begin) % c.block_m, 0);
          ASSERT_GE(t.m, begin);
          if (t.m < end && t.n < n) ++visits[{t.group, t.m, t.n}];
        });
    if (HasFatalFailure()) return;
    std::size_t expected = 0;
    for (const int size : sizes) expected += std::size_t(ceil_div(size, c.block_m)) * ceil_div(n, c.block_n);
    ASSERT_EQ(visits.size(), expected);
    for (const auto& [tile, count] : visits) ASSERT_EQ(count, 1) << "group " << std::get<0>(tile);
  }
}

// Groups of a tile and a third: dealt out strictly in turn, every second CTA would have full tiles only.
TEST(GroupedTiles, FullTilesAreSharedOut) {
  const GemmConfig c{.block_m = 192, .block_n = 128, .num_consumers = 3};
  constexpr int kGroups = 32, kRows = 256, kN = 4096, kCtas = 132;
  std::vector<std::pair<int, int>> ranges;
  for (int g = 0; g < kGroups; ++g) ranges.push_back({g * kRows, (g + 1) * kRows});
  const Table table(c, ranges, kN);
  int most = 0;
  for (int cta = 0; cta < kCtas; ++cta) {
    int full = 0;
    for (const Tile& t : tiles_of(GroupedTiles(c, table.entries.data(), table.num_tiles, kN, 8, cta, kCtas)))
      full += t.m + c.block_m <= t.group_end;
    most = std::max(most, full);
  }
  EXPECT_LE(most, ceil_div(kGroups * kN / c.block_n, kCtas) + 1);
}

TEST(ColumnGroupTiles, EveryGroupHasEveryTileOnce) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  Random random(seed);
  for (int i = 0; i < kRandomCases; ++i) {
    const GemmConfig& c = kConfigs[random.between(0, std::size(kConfigs) - 1)];
    const std::vector<int> sizes = random.sizes(random.between(1, 12));
    std::vector<GroupEntry> table;
    int column = 0;
    for (const int size : sizes) {
      table.push_back({int(table.size()), column, column + size, 0});
      column += size;
    }
    const int m = random.between(1, 900), n = random.between(1, 900), clusters = random.between(1, 140);
    Visits visits;
    walk_grid(
        c, clusters,
        [&](int cta) {
          return ColumnGroupTiles(c, table.data(), int(sizes.size()), m, n, 8, cta, clusters * c.cluster_size());
        },
        [&](const Tile& t) {
          ASSERT_EQ(t.group_begin, table[t.group].begin);
          ASSERT_EQ(t.group_end, table[t.group].end);
          if (t.m < m && t.n < n) ++visits[{t.group, t.m, t.n}];
        });
    if (HasFatalFailure()) return;
    ASSERT_EQ(visits.size(), sizes.size() * ceil_div(m, c.block_m) * ceil_div(n, c.block_n));
    for (const auto& [tile, count] : visits) ASSERT_EQ(count, 1) << "group " << std::get<0>(tile);
  }
}

TEST(ColumnGroupTiles, KBlocksAreThoseThatTheGroupTouches) {
  for (int begin = 0; begin < 400; begin += 7) {
    for (int end = begin; end < 800; end += 11) {
      const Tile t{.m = 0, .n = 0, .group = 0, .group_begin = begin, .group_end = end};
      std::vector<int> touched;
      for (int k = begin; k < end; ++k)
        if (touched.empty() || touched.back() != k / kBlockK) touched.push_back(k / kBlockK);
      const KRange range = k_range(t);
      ASSERT_EQ(range.end - range.begin, int(touched.size())) << begin << " to " << end;
      if (!touched.empty()) {
        ASSERT_EQ(range.begin, touched.front());
      }
    }
  }
}

TEST(GroupFault, SurvivesItsWord) {
  for (const GroupFault f : {GroupFault{GroupsBy::offsets, 0, -1}, GroupFault{GroupsBy::counts, 511, 1 << 30},
                             GroupFault{GroupsBy::row_groups, 200'000'000, -7}}) {
    const u64 word = encode(f);
    EXPECT_NE(word, 0u);
    const GroupFault back = decode_fault(word);
    EXPECT_EQ(back.by, f.by);
    EXPECT_EQ(back.index, f.index);
    EXPECT_EQ(back.value, f.value);
  }
}

}  // namespace
}  // namespace phalanx
