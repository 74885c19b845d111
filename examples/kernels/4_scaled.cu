// Rung 4: fine-grained scales. The tensor cores sum one k-block only; it is then promoted.
//
//     producer                       as before
//     2 consumer warpgroups          wait full[s] -> WGMMA into `partial`, from zero -> arrive at empty[s]
//                                    -> promote: acc += sfa[row, kb] * sfb[n / 128, kb] * partial
//
// Two levels of accumulation: what makes the scales fine-grained also makes a long sum accurate. The price: while a
// warpgroup promotes, on the FP32 pipe, it feeds no tensor core; the other one may, if it is not promoting too.
// 384 threads a CTA, a CTA a tile.
extern "C" __global__ void __launch_bounds__(384) phalanx_kernel(const __grid_constant__ ladder::Problem p) {
  using namespace ladder;
  constexpr int kConsumers = 2;
  extern __shared__ __align__(1024) u8 smem[];
  Ring<6> ring{smem};
  if (threadIdx.x == 0) ring.init(kConsumers * 128);
  __syncthreads();
  ptx::grid_wait_dependencies();

  const Tile t = tile_at(p, blockIdx.x);
  const int warpgroup = warpgroup_index(), num_k_blocks = p.k / kBlock;
  if (warpgroup == kConsumers) {
    if (threadIdx.x % 128 != 0) return;
    for (int kb = 0; kb < num_k_blocks; ++kb, ring.advance()) {
      ring.wait_empty();
      request_scaled(p, t, kb, ring);
    }
    return;
  }

  const float* sfb = scales_b(p, t);
  Accumulator acc;
  clear(acc);
  for (int kb = 0; kb < num_k_blocks; ++kb, ring.advance()) {
    const float scale_b = sfb[kb];  // on its way while we wait
    ring.wait_full();
    Accumulator partial;
    const u64 a = ptx::wgmma_descriptor(ring.a() + warpgroup * 64 * kBlock), b = ptx::wgmma_descriptor(ring.b());
    Wgmma::multiply(partial, a, b, false);
    const float* sfa = ring.sfa() + warpgroup * 64 + fragment_row();
    const float2 scales = make_float2(sfa[0] * scale_b, sfa[8] * scale_b);
    ptx::wgmma_wait<0>();
    ptx::mbarrier_arrive(ring.empty());  // every thread: each has read its own scales
    Wgmma::pin(partial);
    promote(acc, partial, scales);
  }
  store(p, t.m + warpgroup * 64, t.n, acc);
}
