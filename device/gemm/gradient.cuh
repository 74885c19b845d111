// Accumulators -> D in FP32, added to what is there or not: the way out of a weight's gradient.
//
//     registers -> 64 rows x 32 columns of shared memory -> TMA, which stores, or adds in L2 (and clips at D's columns)
//
// D is neither read by a thread nor waited for: it passes under the next tile's products. One CTA sums a tile, so
// nothing else adds to it.
#pragma once
#include "device/gemm/epilogue.cuh"

namespace phalanx {

// A consumer warpgroup's panels, in the order in which they leave.
template <GemmConfig C>
struct GradientPanels {
  static constexpr int kOfTile = C.panels_of_tile(), kOfWave = C.block_n / kGradientColumns;
  u8* base;
  int consumer;

  __device__ u8* panel(int i) const {
    return base + (consumer * C.num_panels() + i % C.num_panels()) * kGradientPanelBytes;
  }
  __device__ int row(const Tile& t, int i) const { return t.m + consumer * C.consumer_rows() + i / kOfWave * 64; }
  __device__ int col(const Tile& t, int i) const { return t.n + i % kOfWave * kGradientColumns; }
  __device__ bool is_issuer() const { return threadIdx.x % kWarpgroup == 0; }
  __device__ void sync() const { ptx::named_barrier_sync(1 + consumer, kWarpgroup); }

  // Of a tile's panels, one a k-block: what is to be added to comes into L2 while the last k-blocks are multiplied. All
  // CTAs end their tiles at about the same time; the reads from memory would hold up the next tile's.
  __device__ static void prefetch(const GemmParams& p, int col, int row, int i) {
    if (i < kOfTile * C.num_consumers)
      ptx::tma_prefetch_2d(&p.d, col + i % kOfWave * kGradientColumns, row + i / kOfWave * 64);
  }

  // This thread's 16 values of a panel: rows of 128 bytes, swizzled.
  __device__ void write(int i, const Accumulator<C>& acc) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const float* x = &acc[i / kOfWave][i % kOfWave * (kGradientColumns / 2)];
    u8* at = panel(i) + row * 128 + lane % 2 * 8;
#pragma unroll
    for (int j = 0; j < kGradientColumns / 8; ++j) {
      const int chunk = ((j * 2 + lane % 4 / 2) ^ (row % 8)) * 16;
      *reinterpret_cast<float2*>(at + chunk) = make_float2(x[j * 4], x[j * 4 + 1]);
      *reinterpret_cast<float2*>(at + chunk + 8 * 128) = make_float2(x[j * 4 + 2], x[j * 4 + 3]);
    }
  }

  // One thread.
  __device__ void send(const GemmParams& p, const u8* panel, int col, int row) const {
    if (p.c_ptr != nullptr)
      ptx::tma_reduce_add_2d(&p.d, panel, col, row);
    else
      ptx::tma_store_2d(&p.d, panel, col, row);
  }

  // TMA would write into the next group, or past the last column: it writes whole 16 bytes. Then element by element.
  __device__ bool crosses_edge(const GemmParams& p, const Tile& t, int i) const {
    return row(t, i) + 64 > t.group_end || (p.n % 4 != 0 && col(t, i) + kGradientColumns > p.n);
  }
  __device__ void copy_out(const GemmParams& p, const Tile& t, int i) const {
    const u8* smem = panel(i);
#pragma unroll 1
    for (int j = threadIdx.x % kWarpgroup; j < 64 * kGradientColumns; j += kWarpgroup) {
      const int r = j / kGradientColumns, c = j % kGradientColumns;
      if (row(t, i) + r >= t.group_end || col(t, i) + c >= p.n) continue;
      float* d = static_cast<float*>(p.d_ptr) + (row(t, i) + r) * p.d_stride + col(t, i) + c;
      const float x = *reinterpret_cast<const float*>(smem + r * 128 + ((c / 4) ^ (r % 8)) * 16 + c % 4 * 4);
      *d = p.c_ptr != nullptr ? *d + x : x;
    }
  }
};

// With room for two panels: one leaves while the other is written.
template <GemmConfig C>
struct GradientStore {
  GradientPanels<C> panels;

  __device__ void store(const GemmParams& p, const Tile& t, const Accumulator<C>& acc) const {
    static_assert(C.num_panels() == 2);
#pragma unroll
    for (int i = 0; i < panels.kOfTile; ++i) {
      if (panels.is_issuer()) ptx::tma_store_wait_read_but<1>();
      panels.sync();  // the panel before the last has left
      panels.write(i, acc);
      ptx::fence_proxy_async();
      panels.sync();
      if (panels.crosses_edge(p, t, i))
        panels.copy_out(p, t, i);
      else if (panels.is_issuer())
        panels.send(p, panels.panel(i), panels.col(t, i), panels.row(t, i));
      if (panels.is_issuer()) ptx::tma_store_commit();  // counts, whoever sends it
    }
  }
};

// With room for all of a tile's: written behind one barrier, they leave one by one under the next tile's k-blocks. All
// at once, the additions in L2 would hold up the loads that TMA has queued behind them.
template <GemmConfig C>
struct PacedGradientStore {
  static constexpr int kPace = 2;  // k-blocks from a panel to the next
  GradientPanels<C> panels;
  int row = 0, col = 0;   // of the tile that is in the panels
  int next = 0, end = 0;  // those of them that are still to leave
  int due = -1;           // the k-block under which the next one does

  __device__ void store(const GemmParams& p, const Tile& t, const Accumulator<C>& acc) {
    static_assert(C.num_waves() == 1 && C.num_panels() == C.panels_of_tile());
    flush(p);
    panels.sync();  // the tile before has left
#pragma unroll
    for (int i = 0; i < panels.kOfTile; ++i) panels.write(i, acc);
    ptx::fence_proxy_async();
    panels.sync();
    row = panels.row(t, 0), col = panels.col(t, 0);
    next = 0, end = panels.kOfTile;
    while (end > 0 && panels.crosses_edge(p, t, end - 1)) panels.copy_out(p, t, --end);
  }

  // A tile's k-blocks begin; under `kb` the first panel may leave.
  __device__ void schedule(int kb) { due = next < end ? kb : -1; }
  __device__ __forceinline__ void send_due(const GemmParams& p, int kb) {
    if (kb != due) return;
    send_next(p);
    due = next < end ? due + kPace : -1;
  }

  __device__ __forceinline__ void send_next(const GemmParams& p) {
    if (panels.is_issuer()) {
      panels.send(p, panels.panel(0) + next * kGradientPanelBytes, col + next * kGradientColumns, row);
      ptx::tma_store_commit();
    }
    ++next;
  }
  __device__ void flush(const GemmParams& p) {
    while (next < end) send_next(p);
    if (panels.is_issuer()) ptx::tma_store_wait_read();
  }
};

}  // namespace phalanx
