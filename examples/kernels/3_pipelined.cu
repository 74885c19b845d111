// Rung 3: a ring of stages between a producer and the consumers, so that memory and tensor cores work at the same time.
//
//     producer (one thread)          wait empty[s] -> request k-block into stage s -> s + 1 ...
//     2 consumer warpgroups          wait full[s] -> WGMMA 64 x 128 x 128 -> arrive at empty[s - 1] -> s + 1 ...
//
// One product stays in flight while the next is issued; a stage is released when its product is done. All of K is
// summed inside the tensor cores: fast, but their accumulator has about 14 bits (docs/numerics.md).
// 384 threads a CTA, a CTA a tile.
extern "C" __global__ void __launch_bounds__(384) phalanx_kernel(const __grid_constant__ ladder::Problem p) {
  using namespace ladder;
  constexpr int kConsumers = 2;
  extern __shared__ __align__(1024) u8 smem[];
  Ring<6> ring{smem};
  if (threadIdx.x == 0) ring.init(kConsumers * 4);  // a warp arrives as one
  __syncthreads();
  ptx::grid_wait_dependencies();

  const Tile t = tile_at(p, blockIdx.x);
  const int warpgroup = warpgroup_index(), num_k_blocks = p.k / kBlock;
  if (warpgroup == kConsumers) {
    if (threadIdx.x % 128 != 0) return;
    for (int kb = 0; kb < num_k_blocks; ++kb, ring.advance()) {
      ring.wait_empty();
      request(p, t, kb, ring.a(), ring.b(), ring.full());
    }
    return;
  }

  Accumulator acc;
  clear(acc);
  u64* in_flight = nullptr;  // empty barrier of the product before
  for (int kb = 0; kb < num_k_blocks; ++kb, ring.advance()) {
    ring.wait_full();
    const u64 a = ptx::wgmma_descriptor(ring.a() + warpgroup * 64 * kBlock), b = ptx::wgmma_descriptor(ring.b());
    Wgmma::multiply(acc, a, b, true);
    ptx::wgmma_wait<1>();
    if (in_flight && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(in_flight);
    in_flight = ring.empty();
  }
  ptx::wgmma_wait<0>();
  Wgmma::pin(acc);
  store(p, t.m + warpgroup * 64, t.n, acc);
}
