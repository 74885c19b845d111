// The tile schedulers, proven by brute force on the host: every tile of D is computed by exactly one CTA (or, under
// split-K, by the CTAs of one cluster, with parts of K that add up), and the CTAs of a cluster agree on what they
// share.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "device/gemm/tiles.h"
#include "plan/plan.h"

namespace phalanx {
namespace {

std::vector<Tile> tiles_of(const GemmConfig& c, int m, int n, int group_m, int cta, int num_ctas) {
  DenseTiles scheduler(c, m, n, group_m, cta, num_ctas);
  std::vector<Tile> tiles;
  for (Tile t; scheduler.next(t);) tiles.push_back(t);
  return tiles;
}

void check_coverage(const GemmConfig& c, int m, int n, int group_m, int num_ctas) {
  std::map<std::pair<int, int>, int> visits;
  for (int first = 0; first < num_ctas; first += c.cluster_size()) {
    const std::vector<Tile> leader = tiles_of(c, m, n, group_m, first, num_ctas);
    for (int rank = 0; rank < c.cluster_size(); ++rank) {
      const std::vector<Tile> tiles = tiles_of(c, m, n, group_m, first + rank, num_ctas);
      ASSERT_EQ(tiles.size(), leader.size()) << "peers of a cluster take as many steps";
      for (std::size_t i = 0; i < tiles.size(); ++i) {
        ASSERT_EQ(tiles[i].m, leader[i].m + rank % c.cluster_m * c.block_m) << "peers share rows of A or";
        ASSERT_EQ(tiles[i].n, leader[i].n + rank % c.cluster_n * c.block_n) << "columns of B";
        ASSERT_GE(tiles[i].m, 0);
        ASSERT_EQ(tiles[i].m % c.block_m, 0);
        ASSERT_EQ(tiles[i].n % c.block_n, 0);
        if (tiles[i].m < m && tiles[i].n < n) ++visits[{tiles[i].m, tiles[i].n}];
      }
    }
  }
  ASSERT_EQ(visits.size(), std::size_t(ceil_div(m, c.block_m)) * ceil_div(n, c.block_n));
  for (const auto& [tile, count] : visits) ASSERT_EQ(count, c.split_k) << "tile " << tile.first << ", " << tile.second;
}

TEST(DenseTiles, EveryTileOnceForRandomShapes) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  const auto random = [&](int lo, int hi) { return std::uniform_int_distribution(lo, hi)(rng); };
  for (int i = 0; i < 3000; ++i) {
    const auto& configs = plan::all_gemm_configs();
    const GemmConfig& c = configs[random(0, int(configs.size()) - 1)];
    const int m = random(1, 3000), n = random(1, 3000), group_m = 1 << random(0, 4), clusters = random(1, 140);
    SCOPED_TRACE(::testing::Message() << "m " << m << " n " << n << " block " << c.block_m << "x" << c.block_n
                                      << " cluster_n " << c.cluster_n << " split_k " << c.split_k << " group_m "
                                      << group_m << " clusters " << clusters);
    check_coverage(c, m, n, group_m, clusters * c.cluster_size());
    if (HasFatalFailure()) return;
  }
}

TEST(DenseTiles, PlansCoverTheirShapes) {
  for (const int num_sms : {1, 7, 78, 132}) {
    for (const int m : {1, 3, 64, 65, 129, 1000, 4097}) {
      for (const int n : {1, 16, 576, 2112, 7168}) {
        for (const int k : {1, 128, 768, 7168}) {
          for (const OutType out : {OutType::bf16, OutType::f32}) {
            const plan::GemmPlan p = plan::plan_gemm({m, n, k, out}, num_sms);
            SCOPED_TRACE(::testing::Message() << m << " " << n << " " << k << " on " << num_sms);
            ASSERT_EQ(p.config.out, out);
            ASSERT_EQ(p.num_ctas % p.config.cluster_size(), 0);
            if (p.config.split_k == 1) {
              ASSERT_LE(p.num_ctas, num_sms) << "a persistent kernel keeps to its SMs";
            } else {
              ASSERT_LE(p.num_ctas, num_sms) << "nor does split-K take more than it may";
              ASSERT_EQ(p.num_ctas, DenseTiles(p.config, m, n, p.group_m, 0, p.num_ctas).count() * p.config.split_k)
                  << "split-K takes one cluster per tile";
            }
            check_coverage(p.config, m, n, p.group_m, p.num_ctas);
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST(DenseTiles, PartsOfKAddUp) {
  for (int k = 1; k < 5000; k += 37)
    for (const int split_k : {1, 2, 3, 4, 8}) {
      int next = 0;
      for (int part = 0; part < split_k; ++part) {
        const KRange r = k_range(k, split_k, part);
        ASSERT_EQ(r.begin, next);
        ASSERT_GE(r.end, r.begin);
        next = r.end;
      }
      ASSERT_EQ(next, ceil_div(k, kBlockK));
    }
}

}  // namespace
}  // namespace phalanx
