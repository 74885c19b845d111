// What the host passes to a GEMM kernel at run time.
#pragma once
#include "device/gemm/groups.h"
#include "device/ptx/tensor_map.h"

namespace phalanx {

// Strides are in elements.
struct GemmParams {
  // First what every role needs before its first load: one or two lines of constant memory.
  int m, n, k;
  int rows_a;      // block_m, or less: those that a tile of few rows has; not of gemm_fp8 without groups
  int group_m;     // see DenseTiles
  int sfa_by_tma;  // else a warp copies `sfa` float by float; of gradients, whether both operands' scales come so
  int constant_b;  // nothing that may still be under way writes B; few rows only
  int streams_b;   // few CTAs read each tile of B: it leaves L2 first. Of few rows always
  int leaves_sms;  // to others, of other streams: the next kernel of this one may not begin early, as it would take them
  const float* sfa;  // [m, ceil(k / 128)]
  const float* sfb;  // [ceil(n / 128), ceil(k / 128)]
  i64 sfa_stride_m, sfa_stride_k, sfb_stride_n, sfb_stride_k;
  void* d_ptr;
  const void* c_ptr;  // null: no C
  i64 d_stride, c_stride;
  TensorMap a;         // box: rows_a / cluster_n rows x 128
  TensorMap a_last;    // E4M3, of last rows that do not fill a box. Box: all of M's; of groups' rows, rows_of_request()
  TensorMap b;         // box: rows_of_request_b() rows x 128
  TensorMap c;         // box: consumer_rows x panel_columns, as D's; C and D only if config.stores_by_tma()
  TensorMap d;         // of gradients, a panel: see GradientPanels
  TensorMap sfa_map;   // box: scales_a_box x 1 of the transposed scales; only if sfa_by_tma
  TensorMap sfb_map;   // the same of B's, block_n x 1; only if config.scales_b_by_row()
  GroupParams groups;  // only if config.grouped()
};

}  // namespace phalanx
