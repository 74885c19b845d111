// Quantisation and back; docs/numerics.md defines every byte, and the CUDA kernels write the same ones.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/cpu.h"
#include "cpu/encode.h"
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

/// Calls f(block) for every block of the matrix `data`, on all cores. A task is a band of rows, so that threads write
/// lines of their own.
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
void quantize_transposed_as(const Tensor& x, const ScaledTensor& q, bool pow2) {
  for_each_block(x, ScaleShape::block_128x128, [&](const Block& block) {
    thread_local std::vector<Row> rows(kQuantizeBlock);
    for (int64_t i = 0; i < block.rows; ++i) widen(row_of<const T>(x, block, i), block.cols, rows[i]);
    for (int64_t j = 0; j < block.cols; ++j) {
      Row column;
      for (int64_t i = 0; i < block.rows; ++i) column[i] = rows[i][j];
      const Block transposed{block.col + j, block.row, 1, block.rows, block.col + j, block.row_block};
      scale_of(q.scales, transposed) = quantize_row(column, block.rows, pow2, row_of<E4m3>(q.data, transposed, 0));
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

void quantize_transposed(const Tensor& x, const ScaledTensor& q, bool pow2_scales) {
  switch (x.dtype) {
    case DType::bf16:
      return quantize_transposed_as<Bf16>(x, q, pow2_scales);
    case DType::f16:
      return quantize_transposed_as<F16>(x, q, pow2_scales);
    default:
      return quantize_transposed_as<float>(x, q, pow2_scales);
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
