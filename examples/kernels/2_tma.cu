// Rung 2: tiles through shared memory by TMA, multiplied by the tensor cores. One k-block at a time.
//
//     thread 0             request A [128, 128], B [128, 128]   ............................   request the next
//     2 warpgroups         ............ wait ................   WGMMA 64 x 128 x 128 each -> all meet
//
// Every byte that is fetched now serves 128 rows or columns. But the tensor cores wait while memory works, and memory
// waits while they work. 256 threads a CTA, a CTA a tile.
extern "C" __global__ void __launch_bounds__(256) phalanx_kernel(const __grid_constant__ ladder::Problem p) {
  using namespace ladder;
  extern __shared__ __align__(1024) u8 smem[];  // the swizzle wants 1024
  u8 *a = smem, *b = smem + kBlockBytes;
  u64* full = reinterpret_cast<u64*>(smem + 2 * kBlockBytes);  // published by TMA, waited for by all
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::grid_wait_dependencies();

  const Tile t = tile_at(p, blockIdx.x);
  const int warpgroup = warpgroup_index();
  Accumulator acc;
  clear(acc);
  for (int kb = 0; kb < p.k / kBlock; ++kb) {
    if (threadIdx.x == 0) request(p, t, kb, a, b, full);
    __syncwarp();
    ptx::mbarrier_wait(full, kb & 1);
    Wgmma::multiply(acc, ptx::wgmma_descriptor(a + warpgroup * 64 * kBlock), ptx::wgmma_descriptor(b), true);
    ptx::wgmma_wait<0>();
    Wgmma::pin(acc);
    __syncthreads();  // both warpgroups have read the k-block: it may be overwritten
  }
  store(p, t.m + warpgroup * 64, t.n, acc);
}
