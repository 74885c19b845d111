// Quantisation and back; docs/numerics.md defines every byte, and the CUDA kernels write the same ones.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/convert.h"
#include "cpu/cpu.h"
#include "cpu/parallel.h"

namespace phalanx::cpu {
namespace {

using std::int64_t;

/// The elements [row, row + rows) x [col, col + cols) that share the scale [row_block, col_block].
struct Block {
  int64_t row, col, rows, cols, row_block, col_block;
};

float& scale_of(const Tensor& scales, const Block& block) {
  return static_cast<float*>(scales.data)[block.row_block * scales.strides[0] + block.col_block * scales.strides[1]];
}

template <class T>
T* row_of(const Tensor& x, const Block& block, int64_t i) {
  return static_cast<T*>(x.data) + (block.row + i) * x.strides[0] + block.col;
}

/// Calls f(block) for every block of the matrix `data`, on all cores. A task is a band of rows, so that threads write lines
/// of their own.
template <class F>
void for_each_block(const Tensor& data, ScaleShape shape, const F& f) {
  const int64_t rows = data.rows(), cols = data.cols();
  const int64_t block_rows = shape == ScaleShape::row_1x128 ? 1 : kQuantizeBlock;
  const int64_t band_rows = kQuantizeBlock, num_bands = (rows + band_rows - 1) / band_rows;
  TaskQueue bands(num_bands);
  run_on_threads(threads_for(num_bands, 0.7 * static_cast<double>(band_rows * cols)), [&](int) {
    for (int64_t band; bands.next(band);) {
      const int64_t end = std::min(rows, (band + 1) * band_rows);
      for (int64_t row = band * band_rows; row < end; row += block_rows) {
        for (int64_t col = 0; col < cols; col += kQuantizeBlock) {
          f(Block{row, col, std::min(block_rows, end - row), std::min<int64_t>(kQuantizeBlock, cols - col),
                  row / block_rows, col / kQuantizeBlock});
        }
      }
    }
  });
}

float larger_if_finite(float amax, float x) {
  const float magnitude = std::fabs(x);
  const float finite = magnitude < std::numeric_limits<float>::infinity() ? magnitude : 0.0f;  // false for NaN
  return amax < finite ? finite : amax;
}

// Simple loops over a row of a block, each of which the compiler vectorises. They stage FP32 in `Row`.
using Row = std::array<float, kQuantizeBlock>;

template <class T>
void widen(const T* x, int64_t count, Row& row) {
  for (int64_t i = 0; i < count; ++i) row[i] = to_f32(x[i]);
}

/// The largest finite |x|. The maximum is taken in lanes, as its order does not matter.
float finite_amax(const Row& row, int64_t count) {
  constexpr int kLanes = 8;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = larger_if_finite(lanes[lane], row[i + lane]);
  }
  for (; i < count; ++i) lanes[0] = larger_if_finite(lanes[0], row[i]);
  return *std::max_element(lanes, lanes + kLanes);
}

void encode(const Row& row, float inv, int64_t count, E4m3* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = from_f32<E4m3>(row[i] * inv);
}

float scale_for(float amax, bool pow2) {
  const float scale = std::max(amax / kE4m3Max, kMinScale);
  return pow2 ? std::bit_cast<float>(pow2_ceil_bits(std::bit_cast<u32>(scale))) : scale;
}

template <class T>
void quantize_as(const Tensor& x, const ScaledTensor& q, ScaleShape shape, bool pow2) {
  for_each_block(x, shape, [&](const Block& block) {
    Row row;
    float amax = 0;
    for (int64_t i = 0; i < block.rows; ++i) {
      widen(row_of<const T>(x, block, i), block.cols, row);
      amax = std::max(amax, finite_amax(row, block.cols));
    }
    const float scale = scale_for(amax, pow2), inv = 1.0f / scale;
    scale_of(q.scales, block) = scale;
    for (int64_t i = 0; i < block.rows; ++i) {
      if (block.rows > 1) widen(row_of<const T>(x, block, i), block.cols, row);
      encode(row, inv, block.cols, row_of<E4m3>(q.data, block, i));
    }
  });
}

template <class T>
void dequantize_as(const ScaledTensor& q, const Tensor& x, ScaleShape shape) {
  for_each_block(x, shape, [&](const Block& block) {
    const float scale = scale_of(q.scales, block);
    for (int64_t i = 0; i < block.rows; ++i) {
      const E4m3* in = row_of<const E4m3>(q.data, block, i);
      T* out = row_of<T>(x, block, i);
      for (int64_t j = 0; j < block.cols; ++j) out[j] = from_f32<T>(kE4m3Values[in[j].bits] * scale);
    }
  });
}

}  // namespace

void quantize(const Tensor& x, const ScaledTensor& q, ScaleShape shape, bool pow2_scales) {
  switch (x.dtype) {
    case DType::bf16:
      return quantize_as<Bf16>(x, q, shape, pow2_scales);
    case DType::f16:
      return quantize_as<F16>(x, q, shape, pow2_scales);
    default:
      return quantize_as<float>(x, q, shape, pow2_scales);
  }
}

void dequantize(const ScaledTensor& q, const Tensor& x, ScaleShape shape) {
  switch (x.dtype) {
    case DType::bf16:
      return dequantize_as<Bf16>(q, x, shape);
    case DType::f16:
      return dequantize_as<F16>(q, x, shape);
    default:
      return dequantize_as<float>(q, x, shape);
  }
}

}  // namespace phalanx::cpu
