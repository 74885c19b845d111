// The quantising kernels' common entry.
#pragma once
#include "device/quantize/quantize_rows.cuh"
#include "device/quantize/quantize_tiles.cuh"

namespace phalanx {

template <QuantizeConfig C>
__device__ __forceinline__ void quantize(const QuantizeParams& p) {
  ptx::grid_launch_dependents();
  if constexpr (C.form != QuantizeForm::rows)
    quantize_tiles<C>(p);
  else if (p.rows_per_warp == 1)
    quantize_rows<C, 1>(p);
  else
    quantize_rows<C, RowTiles::kMany>(p);
}

}  // namespace phalanx
