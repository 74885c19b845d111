// Rung 5: the warpgroups take turns, and CTAs stay.
//
//     consumer 0     issue . . promote . . issue . . promote         a named barrier each: "you may issue" is said when
//     consumer 1     . . issue . . promote . . issue . . promote     the other one has issued, not when it is done
//
// One promotes while the other multiplies, so that promotion hides behind the products. There is one CTA for each SM:
// it walks tile after tile, and the producer fetches the next tile's k-blocks while this one is stored.
// 384 threads a CTA, a CTA an SM.
extern "C" __global__ void __launch_bounds__(384) phalanx_kernel(const __grid_constant__ ladder::Problem p) {
  using namespace ladder;
  constexpr int kConsumers = 2, kPair = kConsumers * 128;
  extern __shared__ __align__(1024) u8 smem[];
  Ring<6> ring{smem};
  if (threadIdx.x == 0) ring.init(kConsumers * 128);
  __syncthreads();
  ptx::grid_wait_dependencies();

  const int warpgroup = warpgroup_index(), num_k_blocks = p.k / kBlock;
  if (warpgroup == kConsumers) {
    if (threadIdx.x % 128 != 0) return;
    for (int index = blockIdx.x; index < num_tiles(p); index += gridDim.x) {
      for (int kb = 0; kb < num_k_blocks; ++kb, ring.advance()) {
        ring.wait_empty();
        request_scaled(p, tile_at(p, index), kb, ring);
      }
    }
    return;
  }

  // Barrier 1 + w: waited for by consumer w before it issues, published by the other one after it has issued.
  const int my_turn = 1 + warpgroup, other_turn = 2 - warpgroup;
  if (warpgroup == 1) ptx::named_barrier_arrive(other_turn, kPair);  // consumer 0 begins
  for (int index = blockIdx.x; index < num_tiles(p); index += gridDim.x) {
    const Tile t = tile_at(p, index);
    const float* sfb = scales_b(p, t);
    Accumulator acc;
    clear(acc);
    for (int kb = 0; kb < num_k_blocks; ++kb, ring.advance()) {
      const float scale_b = sfb[kb];
      ring.wait_full();
      Accumulator partial;
      const u64 a = ptx::wgmma_descriptor(ring.a() + warpgroup * 64 * kBlock), b = ptx::wgmma_descriptor(ring.b());
      ptx::named_barrier_sync(my_turn, kPair);
      Wgmma::multiply(partial, a, b, false);
      const bool nobody_waits = warpgroup == 1 && kb + 1 == num_k_blocks && index + int(gridDim.x) >= num_tiles(p);
      if (!nobody_waits) ptx::named_barrier_arrive(other_turn, kPair);
      const float* sfa = ring.sfa() + warpgroup * 64 + fragment_row();
      const float2 scales = make_float2(sfa[0] * scale_b, sfa[8] * scale_b);
      ptx::wgmma_wait<0>();
      ptx::mbarrier_arrive(ring.empty());
      Wgmma::pin(partial);
      promote(acc, partial, scales);
    }
    store(p, t.m + warpgroup * 64, t.n, acc);
  }
}
