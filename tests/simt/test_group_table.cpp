// The table of groups, built by the device's own code on the host. What it must come to is computed here the obvious
// way.
#include "simt.h"  // first: what CUDA C++ is to the device code

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "device/gemm/group_table.cuh"
#include "device/gemm/grouped_tiles.h"

namespace phalanx {
namespace {

struct Table {
  std::vector<GroupEntry> entries;
  int num_tiles = 0;
  u64 fault = 0;
};

Table build(GroupsBy by, const std::vector<int>& bounds, int num_groups, int limit, int height, int tiles_n) {
  Table table;
  table.entries.resize(kMaxTableGroups + 1);
  GroupParams params{};
  params.bounds = bounds.data(), params.fault = &table.fault, params.by = by;
  params.num_groups = num_groups, params.limit = limit;
  simt::launch(1, simt::kWarp, [&] {
    load_spans(params, table.entries.data());
    const int num_tiles = index_groups(params, table.entries.data(), height, tiles_n);
    if (threadIdx.x == 0) table.num_tiles = num_tiles;
  });
  return table;
}

void expect_rows(const Table& table, const std::vector<std::pair<int, int>>& ranges, int height, int tiles_n) {
  std::size_t entry = 0;
  int tiles = 0;
  for (std::size_t g = 0; g < ranges.size(); ++g) {
    const auto [begin, end] = ranges[g];
    if (begin == end) continue;
    const GroupEntry& e = table.entries[entry++];
    ASSERT_EQ(e.group, int(g));
    ASSERT_EQ(e.begin, begin);
    ASSERT_EQ(e.end, end);
    ASSERT_EQ(e.first_tile, tiles);
    tiles += ceil_div(end - begin, height) * tiles_n;
  }
  ASSERT_EQ(table.entries[entry].first_tile, tiles);
  ASSERT_EQ(table.num_tiles, tiles);
}

TEST(GroupTable, RandomGroups) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(::testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  const auto between = [&](int low, int high) { return std::uniform_int_distribution(low, high)(rng); };
  for (int i = 0; i < 60; ++i) {
    const int num_groups = between(1, i % 4 ? 40 : kMaxTableGroups), height = 64 * between(1, 4),
              tiles_n = between(1, 9);
    std::vector<std::pair<int, int>> by_offset, by_count, by_row;
    std::vector<int> offsets{between(0, 9)}, counts, row_groups, order(num_groups);
    int row = offsets[0];
    for (int g = 0; g < num_groups; ++g) {
      const int size = between(0, 2) ? 0 : between(1, 200);
      by_offset.emplace_back(row, row + size);
      by_count.emplace_back(0, size);
      counts.push_back(size);
      offsets.push_back(row += size);
      order[g] = g;
    }
    std::shuffle(order.begin(), order.end(), rng);
    by_row.resize(num_groups);
    for (const int g : order) {
      const int begin = int(row_groups.size());
      row_groups.insert(row_groups.end(), counts[g], g);
      if (counts[g] > 0) by_row[g] = {begin, int(row_groups.size())};
      row_groups.insert(row_groups.end(), between(0, 3), -1);
    }
    Table table = build(GroupsBy::offsets, offsets, num_groups, row + between(0, 5), height, tiles_n);
    expect_rows(table, by_offset, height, tiles_n);
    ASSERT_EQ(table.fault, 0u);
    table = build(GroupsBy::counts, counts, num_groups, 200, height, tiles_n);
    expect_rows(table, by_count, height, tiles_n);
    ASSERT_EQ(table.fault, 0u);
    table = build(GroupsBy::row_groups, row_groups, num_groups, int(row_groups.size()), height, tiles_n);
    expect_rows(table, by_row, height, tiles_n);
    ASSERT_EQ(table.fault, 0u);
    if (HasFatalFailure()) return;
    table = build(GroupsBy::offsets, offsets, num_groups, row, 0, 1);  // of columns: every group has its entry
    for (int g = 0; g < num_groups; ++g) {
      ASSERT_EQ(table.entries[g].group, g);
      ASSERT_EQ(table.entries[g].begin, by_offset[g].first);
      ASSERT_EQ(table.entries[g].end, by_offset[g].second);
    }
  }
}

void expect_fault(GroupsBy by, const std::vector<int>& bounds, int num_groups, int limit,
                  const std::vector<std::pair<int, int>>& clamped, int index, int value) {
  const Table table = build(by, bounds, num_groups, limit, 64, 1);
  expect_rows(table, clamped, 64, 1);
  ASSERT_NE(table.fault, 0u);
  const GroupFault fault = decode_fault(table.fault);
  EXPECT_EQ(fault.by, by);
  EXPECT_EQ(fault.index, index);
  EXPECT_EQ(fault.value, value);
}

TEST(GroupTable, BadBoundsAreClampedAndReported) {
  expect_fault(GroupsBy::offsets, {0, 20, 10, 40}, 3, 40, {{0, 20}, {20, 20}, {20, 40}}, 2, 10);
  expect_fault(GroupsBy::offsets, {0, 20, 30, 41}, 3, 40, {{0, 20}, {20, 30}, {30, 40}}, 3, 41);
  expect_fault(GroupsBy::offsets, {-5, 20, 30, 40}, 3, 40, {{0, 20}, {20, 30}, {30, 40}}, 0, -5);
  expect_fault(GroupsBy::counts, {20, -1, 3}, 3, 20, {{0, 20}, {0, 0}, {0, 3}}, 1, -1);
  expect_fault(GroupsBy::counts, {20, 21, 3}, 3, 20, {{0, 20}, {0, 20}, {0, 3}}, 1, 21);
  expect_fault(GroupsBy::row_groups, {0, 0, 3, 1}, 3, 4, {{0, 2}, {3, 4}, {0, 0}}, 2, 3);
  expect_fault(GroupsBy::row_groups, {-2, 0, 1, 1}, 3, 4, {{1, 2}, {2, 4}, {0, 0}}, 0, -2);
  const Table pieces = build(GroupsBy::row_groups, {0, 1, 0, 2}, 3, 4, 64, 1);
  expect_rows(pieces, {{0, 0}, {1, 2}, {3, 4}}, 64, 1);
  EXPECT_EQ(decode_fault(pieces.fault).value, 0) << "the group in two pieces";
}

}  // namespace
}  // namespace phalanx
