// Routing is integers: which row of the target each choice of an expert takes. The pure parts, for host and device.
//
//   entry i = t * K + k       the k-th choice of token t; its expert is topk[t, k], outside [0, E): none
//   position of an entry      how many entries before it chose the same expert: rows are in order of (expert, token, k)
//   row of an entry           first row of its expert + its position
//
// Contiguous targets lay the experts one after another, each beginning at a multiple of `alignment`. Masked targets
// give each expert `max_rows` rows of its own. Rows that do not fit are not given out.
#pragma once
#include "device/types.h"

namespace phalanx {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;
constexpr int kMaxEntries = 1 << 27;

// Where rows go. `num_rows` is the capacity of all: of a masked target, the number of experts times `max_rows`.
struct RouteTarget {
  int num_rows = 0;
  int alignment = 1;
  int max_rows = 0;  // of an expert; 0: contiguous

  constexpr bool masked() const { return max_rows > 0; }
};

// Rows that an expert takes of a contiguous target, the padding behind them included.
constexpr int rows_taken(const RouteTarget& target, int count) {
  return ceil_div(count, target.alignment) * target.alignment;
}

// The first row of an expert; `taken` is the sum of rows_taken of the experts before it.
constexpr int first_row(const RouteTarget& target, int expert, int taken) {
  return target.masked() ? expert * target.max_rows : min_of(taken, target.num_rows);
}

// How many of an expert's `count` entries find a row.
constexpr int rows_that_fit(const RouteTarget& target, int first, int count) {
  return min_of(count, target.masked() ? target.max_rows : target.num_rows - first);
}

// The entries [begin, end) that a warp, one of `num_warps`, ranks: neighbouring pieces of equal size.
struct EntryRange {
  int begin, end;
};
constexpr EntryRange entries_of_warp(int num_entries, int warp, int num_warps) {
  const int piece = ceil_div(ceil_div(num_entries, num_warps), 32) * 32;
  const i64 begin = i64(piece) * warp;
  return {int(min_of<i64>(begin, num_entries)), int(min_of<i64>(begin + piece, num_entries))};
}

// Words of shared memory: see RouteSmem.
constexpr int route_smem_words(int num_warps, int num_experts) { return (num_warps + 4) * num_experts + 1; }

}  // namespace phalanx
