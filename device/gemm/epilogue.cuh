// From accumulators to D, with C added on the way.
//
// A consumer thread holds, of each 64-row wave and each 8 columns, two neighbours in row `lane / 4` and two in row
// `lane / 4 + 8` of its warp's 16 rows: the layout of a WGMMA accumulator.
#pragma once
#include "device/gemm/params.h"
#include "device/gemm/tiles.h"
#include "device/ptx/convert.cuh"
#include "device/ptx/mbarrier.cuh"
#include "device/ptx/sync.cuh"
#include "device/ptx/tma.cuh"

namespace phalanx {

template <GemmConfig C>
using Accumulator = float[C.num_waves()][C.block_n / 2];

// Row inside the tile of this thread's first value of a wave.
template <GemmConfig C>
__device__ int fragment_row(int consumer, int wave) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  return consumer * C.consumer_rows() + wave * 64 + warp * 16 + lane / 4;
}

// Where the rows of D end that the tile may write.
template <GemmConfig C>
__device__ int end_row(const GemmParams& p, const Tile& t) {
  return C.grouped() ? t.group_end : p.m;
}

// --- pieces of a row -------------------------------------------------------------------------------------------------

// Part of one row of C or D, beginning at an even column; `cols` elements are left in it. Read and written in pairs: a
// pair is aligned, and an odd N leaves a single element at the end.
template <OutType kOut>
struct RowPiece {
  using Element = typename Conditional<kOut == OutType::f32, float, u16>::Type;
  Element* p;
  int cols;

  __device__ RowPiece(const void* base, i64 offset, int cols_)
      : p(static_cast<Element*>(const_cast<void*>(base)) + offset), cols(cols_) {}

  __device__ float2 load(int col) const {
    if (col + 1 < cols) {
      if constexpr (kOut == OutType::f32) return *reinterpret_cast<const float2*>(p + col);
      const u32 pair = *reinterpret_cast<const u32*>(p + col);
      return make_float2(ptx::bf16_lo(pair), ptx::bf16_hi(pair));
    }
    if (col >= cols) return make_float2(0, 0);
    if constexpr (kOut == OutType::f32) return make_float2(p[col], 0);
    return make_float2(ptx::bf16_to_float(p[col]), 0);
  }

  // Both of a pair, if the row has both; the first, if the row ends with it. Apart, so that the one needs no branch.
  __device__ void store_pair(int col, float2 v) const {
    if (col + 1 >= cols) return;
    if constexpr (kOut == OutType::f32)
      *reinterpret_cast<float2*>(p + col) = v;
    else
      *reinterpret_cast<u32*>(p + col) = ptx::pack_bf16(v.x, v.y);
  }
  __device__ void store_last(int col, float2 v) const {
    if (col + 1 != cols) return;
    if constexpr (kOut == OutType::f32)
      p[col] = v.x;
    else
      p[col] = static_cast<u16>(ptx::pack_bf16(v.x, 0));
  }
  __device__ void store(int col, float2 v) const {
    store_pair(col, v);
    store_last(col, v);
  }
};

// --- three ways out --------------------------------------------------------------------------------------------------

// Registers -> D.
template <GemmConfig C>
__device__ void store_tile_direct(const GemmParams& p, const Tile& t, int consumer, Accumulator<C>& acc) {
  const int col = t.n + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < C.num_waves() * 2; ++i) {
    const int row = t.m + fragment_row<C>(consumer, i / 2) + i % 2 * 8;
    float* x = &acc[i / 2][i % 2 * 2];
    if (row >= end_row<C>(p, t)) continue;
    if (C.grouping != Grouping::rows && __builtin_expect(p.c_ptr != nullptr, false)) {
      const RowPiece<C.out> c(p.c_ptr, row * p.c_stride + col, p.n - col);
#pragma unroll
      for (int j = 0; j < C.block_n / 8; ++j) {
        const float2 v = c.load(j * 8);
        x[j * 4] += v.x, x[j * 4 + 1] += v.y;
      }
    }
    const RowPiece<C.out> d(p.d_ptr, row * p.d_stride + col, p.n - col);
#pragma unroll
    for (int j = 0; j < C.block_n / 8; ++j) d.store_pair(j * 8, make_float2(x[j * 4], x[j * 4 + 1]));
    if (p.n % 2 != 0)
#pragma unroll
      for (int j = 0; j < C.block_n / 8; ++j) d.store_last(j * 8, make_float2(x[j * 4], x[j * 4 + 1]));
  }
}

// Registers -> swizzled shared memory -> TMA, which clips at the edges of D and runs on under the next tile. C comes
// the other way through the same buffer, requested before the tile is multiplied. Each consumer stages its own rows, in
// panels.
template <GemmConfig C>
struct StagedTile {
  u8* base;
  u64* c_full;  // one per consumer; published by TMA: its rows of C have arrived
  u32 phase = 0;

  static constexpr int kChunks = C.panel_columns() / 8;  // of 16 bytes, in a row of a panel

  __device__ u8* panel(int index, int row) const { return base + (index * C.block_m + row) * kChunks * 16; }
  // 8 columns of a row. TMA's swizzle: in a line of 128 bytes, a chunk of a row lies where its number and the line's
  // differ.
  __device__ u8* chunk_at(int row, int chunk) const {
    constexpr int kRows = 8 / kChunks;  // of a line
    const int line = row / kRows, place = row % kRows * kChunks + chunk % kChunks;
    return panel(chunk / kChunks, line * kRows) + (place ^ (line % kChunks)) * 16;
  }

  // One thread. The previous tile has to leave the buffer first.
  __device__ void load_c(const GemmParams& p, const Tile& t, int consumer) const {
    const int row = consumer * C.consumer_rows();
    ptx::tma_store_wait_read();
    ptx::mbarrier_arrive_expect_tx(&c_full[consumer], C.consumer_rows() * C.block_n * 2);
    for (int i = 0; i < C.block_n / C.panel_columns(); ++i)
      ptx::tma_load_2d(panel(i, row), &p.c, &c_full[consumer], t.n + i * C.panel_columns(), t.m + row);
  }

  // Visits this thread's place in every 8 x 32-byte piece of the staged tile: f(shared memory, its 8 values).
  template <class F>
  __device__ void for_each_piece(int consumer, Accumulator<C>& acc, F f) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int wave = 0; wave < C.num_waves(); ++wave) {
      const int row = consumer * C.consumer_rows() + wave * 64 + warp * 16 + lane % 16;
#pragma unroll
      for (int i = 0; i < C.block_n / 8; i += 2) {  // two 8-column chunks at a time
        f(chunk_at(row, i + lane / 16), &acc[wave][i * 4]);
      }
    }
  }

  __device__ void store(const GemmParams& p, const Tile& t, int consumer, Accumulator<C>& acc) {
    const bool is_issuer = threadIdx.x % kWarpgroup == 0;
    if (!C.grouped() && p.c_ptr != nullptr) {  // a pass of its own, so that who has no C pays nothing
      ptx::mbarrier_wait(&c_full[consumer], phase);
      phase ^= 1;
      for_each_piece(consumer, acc, [](u8* smem, float* x) {
        u32 pairs[4];
        ptx::ldmatrix_x4(pairs, smem);
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j * 2] += ptx::bf16_lo(pairs[j]), x[j * 2 + 1] += ptx::bf16_hi(pairs[j]);
      });
    } else {
      if (is_issuer) ptx::tma_store_wait_read();
      ptx::named_barrier_sync(1 + consumer, kWarpgroup);  // the previous tile has left the buffer
    }
    for_each_piece(consumer, acc, [](u8* smem, const float* x) {
      const u32 pairs[4] = {ptx::pack_bf16(x[0], x[1]), ptx::pack_bf16(x[2], x[3]), ptx::pack_bf16(x[4], x[5]),
                            ptx::pack_bf16(x[6], x[7])};
      ptx::stmatrix_x4(smem, pairs);
    });
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1 + consumer, kWarpgroup);
    const bool past_columns = p.n % 8 != 0 && t.n + C.block_n > p.n;  // TMA writes whole 16 bytes
    bool past_rows = false;                                           // and whole boxes
    if constexpr (C.grouped()) past_rows = t.m + (consumer + 1) * C.consumer_rows() > t.group_end;
    if (past_columns || past_rows) {
      if constexpr (C.grouped())
        copy_rows(p, t, consumer);
      else
        copy_out(p, t, consumer);
      ptx::named_barrier_sync(1 + consumer, kWarpgroup);  // C of the next tile may come
    } else if (is_issuer) {
      const int row = consumer * C.consumer_rows();
      for (int i = 0; i < C.block_n / C.panel_columns(); ++i)
        ptx::tma_store_2d(&p.d, panel(i, row), t.n + i * C.panel_columns(), t.m + row);
      ptx::tma_store_commit();
    }
  }

  // One thread a row at a time, element by element: slow, and rare.
  __device__ void copy_out(const GemmParams& p, const Tile& t, int consumer) const {
#pragma unroll 1
    for (int i = threadIdx.x % kWarpgroup; i < C.consumer_rows(); i += kWarpgroup) {
      const int row = consumer * C.consumer_rows() + i;
      if (t.m + row >= p.m) return;
      u16* d = static_cast<u16*>(p.d_ptr) + (t.m + row) * p.d_stride + t.n;
#pragma unroll 1
      for (int col = 0; col < C.block_n && t.n + col < p.n; ++col) {
        d[col] = *reinterpret_cast<const u16*>(chunk_at(row, col / 8) + col % 8 * 2);
      }
    }
  }

  // Of a group's last tile, so not rare: 16 bytes a thread, eight of them a panel's row.
  __device__ void copy_rows(const GemmParams& p, const Tile& t, int consumer) const {
    constexpr int kRowChunks = C.block_n / 8;
    const int first = consumer * C.consumer_rows(), rows = min_of(C.consumer_rows(), end_row<C>(p, t) - t.m - first);
#pragma unroll 1
    for (int i = threadIdx.x % kWarpgroup; i < rows * kRowChunks; i += kWarpgroup) {
      const int row = first + i / kRowChunks, chunk = i % kRowChunks, cols = p.n - t.n - chunk * 8;
      const u8* staged = chunk_at(row, chunk);
      u16* d = static_cast<u16*>(p.d_ptr) + (t.m + row) * p.d_stride + t.n + chunk * 8;
      if (cols >= 8)
        *reinterpret_cast<uint4*>(d) = *reinterpret_cast<const uint4*>(staged);
      else
#pragma unroll 1
        for (int col = 0; col < cols; ++col) d[col] = reinterpret_cast<const u16*>(staged)[col];
    }
  }
};

// Registers -> shared memory -> sum over the cluster, in rank order -> D. Each CTA sums and stores its share of the
// rows.
template <GemmConfig C>
struct SplitKReduction {
  static constexpr int kRowFloats = C.block_n + kPartialPad;
  float* partial;

  __device__ void publish(int consumer, const Accumulator<C>& acc) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int wave = 0; wave < C.num_waves(); ++wave) {
      float* row = partial + fragment_row<C>(consumer, wave) * kRowFloats + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < C.block_n / 8; ++i) {
        const float* x = &acc[wave][i * 4];
        *reinterpret_cast<float2*>(row + i * 8) = make_float2(x[0], x[1]);
        *reinterpret_cast<float2*>(row + 8 * kRowFloats + i * 8) = make_float2(x[2], x[3]);
      }
    }
  }

  __device__ void sum_and_store(const GemmParams& p, const Tile& t, int part) const {
    constexpr int kRows = C.block_m / C.split_k, kVectors = C.block_n / 4;
    for (int i = threadIdx.x; i < kRows * kVectors; i += C.num_threads()) {
      const int row = part * kRows + i / kVectors, col = i % kVectors * 4;
      if (t.m + row >= p.m) break;
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int peer = 0; peer < C.split_k; ++peer) {
        const float4 x = ptx::load_cluster_f4(partial + row * kRowFloats + col, peer);
        sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
      }
      const int cols = p.n - t.n - col;
      if (p.c_ptr != nullptr) {
        const RowPiece<C.out> c(p.c_ptr, (t.m + row) * p.c_stride + t.n + col, cols);
        const float2 lo = c.load(0), hi = c.load(2);
        sum = make_float4(sum.x + lo.x, sum.y + lo.y, sum.z + hi.x, sum.w + hi.y);
      }
      const RowPiece<C.out> d(p.d_ptr, (t.m + row) * p.d_stride + t.n + col, cols);
      d.store(0, make_float2(sum.x, sum.y));
      d.store(2, make_float2(sum.z, sum.w));
    }
  }
};

}  // namespace phalanx
