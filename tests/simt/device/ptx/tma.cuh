#pragma once
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/tensor_map.h"

namespace phalanx::ptx {

/// What a tensor map says, in its place.
struct SimtTensorMap {
  u8* data;
  i64 rows, cols, row_bytes;
  int element_bytes, box_rows, box_cols;
  bool swizzle;

  static const SimtTensorMap& of(const TensorMap& map) { return reinterpret_cast<const SimtTensorMap&>(map); }
  operator TensorMap() const {
    TensorMap map;
    std::memcpy(&map, this, sizeof *this);
    return map;
  }
  int box_bytes() const { return box_rows * box_cols * element_bytes; }

  /// f(element in the matrix or null where there is none, its offset from the beginning of shared memory).
  template <class F>
  void for_each(u32 smem, int x, int y, F f) const {
    for (int i = 0; i < box_rows; ++i) {
      for (int j = 0; j < box_cols; ++j) {
        const bool inside = y + i >= 0 && y + i < rows && x + j >= 0 && x + j < cols;
        const u32 at = smem + (i * box_cols + j) * element_bytes;
        f(inside ? data + (y + i) * row_bytes + (x + j) * element_bytes : nullptr,
          swizzle ? simt_swizzled(at, box_cols * element_bytes) : at);
      }
    }
  }
};
static_assert(sizeof(SimtTensorMap) <= sizeof(TensorMap));

inline void prefetch_tensor_map(const TensorMap*) {}

inline void tma_load_2d_multicast(void* smem, const TensorMap* map, u64* bar, int x, int y, u16 cta_mask) {
  simt::later([=, to = smem_addr(smem), &m = SimtTensorMap::of(*map)] {
    for (int rank = 0; cta_mask >> rank; ++rank) {
      if (!(cta_mask >> rank & 1)) continue;
      with_mbarrier(bar, rank, [&](auto& b) {
        u8* shared = simt::cta->cluster->ctas[rank]->shared;
        m.for_each(to, x, y, [&](const u8* from, u32 at) {
          if (from)
            std::memcpy(shared + at, from, m.element_bytes);
          else
            std::memset(shared + at, 0, m.element_bytes);
        });
        b.receive(m.box_bytes());
      });
    }
  });
}
inline void tma_load_2d(void* smem, const TensorMap* map, u64* bar, int x, int y) {
  tma_load_2d_multicast(smem, map, bar, x, y, u16(1 << simt_rank()));
}
inline void bulk_load(void* smem, const void* global, u32 bytes, u64* bar) {
  simt::later([=] {
    with_mbarrier(bar, simt_rank(), [&](auto& b) {
      std::memcpy(smem, global, bytes);
      b.receive(int(bytes));
    });
  });
}
inline void tma_load_2d_once(void* smem, const TensorMap* map, u64* bar, int x, int y) {
  tma_load_2d(smem, map, bar, x, y);
}

inline void tma_prefetch_2d(const TensorMap*, int, int) {}
inline void tma_prefetch_2d_once(const TensorMap*, int, int) {}

inline void simt_store(const TensorMap* map, const void* smem, int x, int y, bool add) {
  simt::fiber().open_stores.push_back([=, from = smem_addr(smem), &m = SimtTensorMap::of(*map)] {
    m.for_each(from, x, y, [&](u8* to, u32 at) {
      if (!to) return;
      float value[2];
      std::memcpy(&value[0], to, m.element_bytes);
      std::memcpy(&value[1], simt::cta->shared + at, m.element_bytes);
      if (add) value[1] += value[0];
      std::memcpy(to, &value[1], m.element_bytes);
    });
  });
}
inline void tma_store_2d(const TensorMap* map, const void* smem, int x, int y) { simt_store(map, smem, x, y, false); }
inline void tma_reduce_add_2d(const TensorMap* map, const void* smem, int x, int y) {
  simt_store(map, smem, x, y, true);
}
inline void tma_store_commit() {
  simt::Fiber& f = simt::fiber();
  f.stores.push_back([stores = std::move(f.open_stores)] {
    for (const auto& store : stores) store();
  });
  f.open_stores.clear();
}
template <int kPending>
void tma_store_wait_read_but() {
  for (auto& stores = simt::fiber().stores; int(stores.size()) > kPending; stores.pop_front()) stores.front()();
}
inline void tma_store_wait_read() { tma_store_wait_read_but<0>(); }
inline void tma_store_wait_all() { tma_store_wait_read_but<0>(); }

}  // namespace phalanx::ptx
