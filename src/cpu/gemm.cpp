// D = A · Bᵀ (+ C), one product or many, in tiles. A thread decodes the tile's rows of A and B, one k-block at a time,
// into FP32 scratch that fits its L2 cache, multiplies them with the BLAS, and promotes the product with the scales
// (BF16 has none: they are one):
//
//     A [tile_m, 128] ─ decode ─┐
//                               ├─ SGEMM → partial [tile_m, panel] ─ × sfa · sfb → acc [tile_m, tile_n] ─ + C, round →
//                               D
//     B [panel, 128] ── decode ─┘
//
// Tiles depend on the shape alone, and one thread computes a tile from its first k-block to its last: the number of
// threads cannot change a bit.
#include <cblas.h>
#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <semaphore>
#include <vector>

#include "cpu/convert.h"
#include "cpu/cpu.h"
#include "cpu/gemm_bf16.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "device/gemm/config.h"

namespace phalanx::cpu {
namespace {

using std::int64_t;

constexpr int kMaxTileM = 512, kMinTileM = 64;
constexpr int kMaxTileN = 512, kMinTileN = kScaleBlock;
constexpr int kEnoughTiles = 16;     // to occupy many cores
constexpr int kPanel = kScaleBlock;  // columns that share one scale of B

// What one thread needs beyond inputs and outputs, besides the BLAS's own packing buffer.
struct Scratch {
  alignas(64) float a[kMaxTileM * kBlockK];
  alignas(64) float b[kPanel * kBlockK];
  alignas(64) float partial[kMaxTileM * kPanel];
  alignas(64) float scales_b[kPanel];
  alignas(64) float acc[kMaxTileM * kMaxTileN];
};

// OpenBLAS has a fixed number of packing buffers, and ends the process when they are used up: callers beyond wait here.
constexpr int kBuffers = 64;
std::counting_semaphore<kBuffers> buffers{kBuffers};
void acquire_all_buffers() {
  for (int i = 0; i < kBuffers; ++i) buffers.acquire();
}
void release_all_buffers() { buffers.release(kBuffers); }

// out [m, n] = a [m, k] · b [n, k]ᵀ, on this thread.
void multiply(const float* a, const float* b, float* out, int m, int n, int k) {
  // Our copy of OpenBLAS is private, so this setting is nobody else's.
  static std::once_flag once;
  std::call_once(once, [] {
    openblas_set_num_threads(1);
    // Its locks and buffers would stay taken for ever in a child, if other threads had them when it was forked.
    pthread_atfork(acquire_all_buffers, release_all_buffers, release_all_buffers);
  });
  buffers.acquire();
  if (m == 1) {
    cblas_sgemv(CblasRowMajor, CblasNoTrans, n, k, 1.0f, b, kBlockK, a, 1, 0.0f, out, 1);
  } else {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1.0f, a, kBlockK, b, kBlockK, 0.0f, out, kPanel);
  }
  buffers.release();
}

// Rows of E4M3, `k` of each, as FP32 rows of kBlockK.
void decode_e4m3(const std::uint8_t* codes, int64_t row_stride, int rows, int k, float* __restrict out) {
  for (int i = 0; i < rows; ++i, codes += row_stride, out += kBlockK) {
    // The next k-block of this row, two cache lines: hardware does not see so wide a stride coming.
    __builtin_prefetch(codes + kBlockK);
    __builtin_prefetch(codes + kBlockK + 64);
    for (int j = 0; j < k; ++j) out[j] = kE4m3Values[codes[j]];
  }
}

// The same of BF16 with any strides; the shorter one in the inner loop.
void decode_bf16(const Bf16* x, int64_t row_stride, int64_t col_stride, int rows, int k, float* __restrict out) {
  if (col_stride == 1) {
    for (int i = 0; i < rows; ++i, x += row_stride, out += kBlockK)
      for (int j = 0; j < k; ++j) out[j] = to_f32(x[j]);
  } else {
    for (int j = 0; j < k; ++j, x += col_stride)
      for (int i = 0; i < rows; ++i) out[i * kBlockK + j] = to_f32(x[i * row_stride]);
  }
}

// `rows` rows from `row` on, `k` columns from `k0` on.
void decode(const Tensor& x, int64_t row, int64_t k0, int rows, int k, float* out) {
  const int64_t first = row * x.strides[0] + k0 * x.strides[1];
  if (x.dtype == DType::bf16)
    decode_bf16(static_cast<const Bf16*>(x.data) + first, x.strides[0], x.strides[1], rows, k, out);
  else
    decode_e4m3(static_cast<const std::uint8_t*>(x.data) + row * x.strides[0] + k0, x.strides[0], rows, k, out);
}

// Without scales: one.
float scale_at(const Tensor& scales, int64_t i, int64_t j) {
  if (scales.data == nullptr) return 1;
  return static_cast<const float*>(scales.data)[i * scales.strides[0] + j * scales.strides[1]];
}

struct Tile {
  int64_t m0, n0;
  int m, n;
};

// How D is cut: tiles as large as leaves enough of them.
class Tiling {
 public:
  Tiling(int64_t m, int64_t n) : m_(m), n_(n) {
    while (tile_m_ / 2 >= m && tile_m_ > kMinTileM) tile_m_ /= 2;
    // Squarish tiles decode least: halve the longer side.
    while (size() < kEnoughTiles && (tile_m_ > kMinTileM || tile_n_ > kMinTileN))
      (tile_n_ >= tile_m_ && tile_n_ > kMinTileN ? tile_n_ : tile_m_) /= 2;
  }

  int64_t size() const { return count_m() * ((n_ + tile_n_ - 1) / tile_n_); }
  double elements() const { return static_cast<double>(std::min<int64_t>(tile_m_, m_)) * tile_n_; }

  // Down a column of tiles first: the rows of B stay in the shared cache.
  Tile operator[](int64_t i) const {
    const int64_t m0 = i % count_m() * tile_m_, n0 = i / count_m() * tile_n_;
    return {m0, n0, static_cast<int>(std::min<int64_t>(tile_m_, m_ - m0)),
            static_cast<int>(std::min<int64_t>(tile_n_, n_ - n0))};
  }

 private:
  int64_t count_m() const { return (m_ + tile_m_ - 1) / tile_m_; }

  int64_t m_, n_;
  int tile_m_ = kMaxTileM, tile_n_ = kMaxTileN;
};

// acc [tile.m, tile.n], rows kMaxTileN apart.
void accumulate_tile(const Product& p, const Tile& tile, Scratch& scratch) {
  std::fill_n(scratch.acc, tile.m * kMaxTileN, 0.0f);
  // Inside a BLAS the order of a row's sums depends on the number of rows, and on the row's place among them.
  const int rows_at_once = p.batch_invariant ? 1 : tile.m;
  for (int64_t k0 = p.k_begin; k0 < p.k_end; k0 += kBlockK - k0 % kBlockK) {  // up to the next multiple of 128
    const int64_t k_block = k0 / kBlockK;
    const int k = static_cast<int>(std::min((k_block + 1) * kBlockK, p.k_end) - k0);
    decode(p.a.data, tile.m0, k0, tile.m, k, scratch.a);
    for (int n0 = 0; n0 < tile.n; n0 += kPanel) {
      const int n = std::min(kPanel, tile.n - n0);
      decode(p.b.data, tile.n0 + n0, k0, n, k, scratch.b);
      for (int i = 0; i < tile.m; i += rows_at_once)
        multiply(scratch.a + i * kBlockK, scratch.b, scratch.partial + i * kPanel, rows_at_once, n, k);
      for (int j = 0; j < n; ++j) {
        const int64_t column = tile.n0 + n0 + j;
        scratch.scales_b[j] = scale_at(p.b.scales, p.b_by_rows ? column : column / kScaleBlock, k_block);
      }
      for (int i = 0; i < tile.m; ++i) {
        const float scale = scale_at(p.a.scales, tile.m0 + i, k_block);
        float* acc = scratch.acc + i * kMaxTileN + n0;
        const float* partial = scratch.partial + i * kPanel;
        for (int j = 0; j < n; ++j) acc[j] += scale * scratch.scales_b[j] * partial[j];
      }
    }
  }
}

template <class T>
void store_tile(const float* acc, const Tensor& d, const Tensor* c, const Tile& tile) {
  for (int i = 0; i < tile.m; ++i, acc += kMaxTileN) {
    T* out = static_cast<T*>(d.data) + (tile.m0 + i) * d.strides[0] + tile.n0;
    if (c == nullptr) {
      for (int j = 0; j < tile.n; ++j) out[j] = from_f32<T>(acc[j]);
    } else {
      const T* in = static_cast<const T*>(c->data) + (tile.m0 + i) * c->strides[0] + tile.n0;
      for (int j = 0; j < tile.n; ++j) out[j] = from_f32<T>(acc[j] + to_f32(in[j]));
    }
  }
}

}  // namespace

void multiply(std::span<const Product> products) {
  // The tiles of all products in one row: product i has those from first[i] on.
  std::vector<Tiling> tilings;
  std::vector<int64_t> first{0};
  double cost = 0;
  for (const Product& p : products) {
    const Tiling& tiling = tilings.emplace_back(p.d.rows(), p.d.cols());
    first.push_back(first.back() + tiling.size());
    // Roughly: 30 multiply-adds a nanosecond, 2 codes decoded.
    cost += static_cast<double>(tiling.size() * (p.k_end - p.k_begin)) * (tiling.elements() / 30 + kMinTileN / 2.0);
  }
  const int64_t num_tiles = first.back();
  if (num_tiles == 0) return;

  const int num_threads = threads_for(num_tiles, cost / static_cast<double>(num_tiles));
  std::vector<std::unique_ptr<Scratch>> scratch(num_threads);
  for (auto& s : scratch) s = std::make_unique_for_overwrite<Scratch>();

  TaskQueue tiles(num_tiles);
  run_on_threads(num_threads, [&](int thread_idx) {
    Scratch& mine = *scratch[thread_idx];
    for (int64_t i; tiles.next(i);) {
      const auto product = std::upper_bound(first.begin(), first.end(), i) - first.begin() - 1;
      const Product& p = products[product];
      const Tile tile = tilings[product][i - first[product]];
      accumulate_tile(p, tile, mine);
      p.d.dtype == DType::f32 ? store_tile<float>(mine.acc, p.d, p.c, tile)
                              : store_tile<Bf16>(mine.acc, p.d, p.c, tile);
    }
  });
}

void gemm_fp8(const ScaledTensor& a, const ScaledTensor& b, const Tensor& d, const Tensor* c, bool batch_invariant) {
  const Product product{.a = a, .b = b, .k_end = a.data.cols(), .d = d, .c = c, .batch_invariant = batch_invariant};
  multiply({&product, 1});
}

void gemm_bf16(const Tensor& a, const Tensor& b, const Tensor& d, const Tensor* c, bool batch_invariant) {
  gemm_fp8({a, {}}, {b, {}}, d, c, batch_invariant);
}

}  // namespace phalanx::cpu
