// The groups of a grouped product: what the host passes, and the table that a CTA makes of it in shared memory.
#pragma once
#include "device/types.h"

namespace phalanx {

constexpr int kMaxTableGroups = 512;

// How a kernel is told which rows, or columns of K, each group has.
enum class GroupsBy { offsets, row_groups, counts };

// Strides are in elements, pitches in rows of a tensor map: how far apart the same row of two neighbouring groups lies.
struct GroupParams {
  const int* bounds;  // int32 [num_groups + 1], [limit] or [num_groups]
  u64* fault;         // a word of the host's; see GroupFault
  GroupsBy by;
  int num_groups, limit;  // rows of A; by counts, rows of each A[g]; of a weight gradient, columns
  int a_pitch = 0, b_pitch = 0, d_pitch = 0;
  int sfa_pitch_x = 0, sfa_pitch_y = 0;  // along the rows and along the k-blocks of `sfa_map`
  i64 sfa_stride_g = 0, sfb_stride_g = 0;
  int one_tile_each = 0;  // of groups of rows: almost all are expected to have some, and no more than a tile's
};

// One group: its rows (or columns) [begin, end), and the first of its tiles in the row of all groups' tiles.
struct alignas(16) GroupEntry {
  int group, begin, end, first_tile;
};

// A bound of the caller's that contradicts the others, in one word so that it is written at once: no kernel waits, and
// the last one to complain is heard. Zero: all is well.
struct GroupFault {
  GroupsBy by;
  int index, value;
};
constexpr u64 encode(const GroupFault& f) {
  return u64{1} << 63 | static_cast<u64>(f.by) << 60 | (static_cast<u64>(f.index) & 0xfffffff) << 32 |
         static_cast<u32>(f.value);
}
constexpr GroupFault decode_fault(u64 word) {
  return {static_cast<GroupsBy>(word >> 60 & 7), static_cast<int>(word >> 32 & 0xfffffff), static_cast<int>(word)};
}

}  // namespace phalanx
