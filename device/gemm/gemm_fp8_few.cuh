// D of few rows: D[m, n] = sum over k-blocks of  sfa[m, kb] * sfb[n / 128, kb] * (A[m, kb] · B[n, kb])  (+ C[m, n])
//
// The rows of B fill the 64 rows of the tensor cores' products and those of A their columns: Dᵀ = B · Aᵀ, and no
// product is larger than the rows that there are. What takes time is to stream B, and what happens between two kernels:
//
//     one thread              B by TMA. The first stages before the previous kernel ends, if B does not come from it
//     one warp                A and its scales by TMA, after that end
//     one warp                makes the barriers meanwhile
//     consumer warpgroups     take k-blocks in turn: 64 x block_m x 128 by WGMMA, promotion, as in gemm_fp8
//
// Each consumer has a sum of its own, and where K is split over a cluster, so has each CTA. These parts of a tile are
// added in their order. In a cluster each CTA adds a slice of the columns: the others send theirs as soon as they have
// them, and a barrier counts the bytes. Small enough that two CTAs share an SM: two of this kernel, or one and the next
// kernel's.
#pragma once
#include "device/gemm/roles.cuh"
#include "device/ptx/wgmma.cuh"

namespace phalanx {

// The k-blocks of a tile in the order in which they are taken. Tiles begin at different ones: if all CTAs read the same
// rows of A at the same time, one slice of the L2 would serve them one after the other.
struct KOrder {
  int begin, count, first;

  __device__ KOrder(const KRange& ks, int tile)
      : begin(ks.begin), count(ks.end - ks.begin), first(count > 0 ? tile % count : 0) {}
  __device__ int operator[](int i) const {
    const int k_block = first + i;
    return begin + (k_block < count ? k_block : k_block - count);
  }
};

// All k-blocks of a CTA, tile after tile. Tiles are side by side: one holds all rows of D.
template <GemmConfig C>
struct KBlocks {
  DenseTiles tiles;
  KRange ks;
  Tile t{};
  KOrder order;
  int i = 0;
  bool more;

  __device__ KBlocks(const GemmParams& p, const SharedMemory<C>& smem)
      : tiles(my_tiles<C>(p, smem)), ks(my_k_range<C>(p, t)), order(ks, 0), more(ks.begin < ks.end) {
    next_tile();
  }
  __device__ int k_block() const { return order[i]; }
  __device__ void advance() {
    if (++i == order.count) next_tile();
  }
  __device__ void next_tile() {
    more = more && tiles.next(t);
    order = KOrder(ks, t.n / C.block_n), i = 0;
  }
};

// A role finds its first tile before it calls this, once a thread, whole warps; from then on barriers are there.
template <GemmConfig C>
__device__ __forceinline__ void begin() {
  ptx::barrier_sync(0, C.num_threads());
}

// --- producers ------------------------------------------------------------------------------------------------------

// Stages that are under way at once until the previous kernel ends. The unit that loads takes requests in turn: A of
// the CTA beside this one, whose kernel has just begun, would wait behind all that stand there. And what comes late
// then comes while that kernel ends, when nobody else asks for anything.
constexpr int kStagesAhead = 2;

// One warp, of which one thread loads.
template <GemmConfig C>
__device__ void stream_weights(const GemmParams& p, const SharedMemory<C>& smem) {
  auto pipe = smem.pipeline();
  KBlocks<C> at(p, smem);
  begin<C>();
  if (!ptx::elect_one()) return;
  if (!p.constant_b) ptx::grid_wait_dependencies();
  int requested = p.constant_b ? 0 : C.num_stages;  // all at once, where nothing is known ahead
#pragma unroll 1
  for (; at.more; at.advance(), pipe.advance(), ++requested) {
    pipe.wait_empty();
    if (requested >= kStagesAhead && requested < C.num_stages)
      while (!ptx::mbarrier_test(&pipe.full[requested - kStagesAhead], 0) && !ptx::mbarrier_test(smem.begun(), 0))
        continue;
    u64* full = &pipe.full[pipe.stage];
    ptx::mbarrier_arrive_expect_tx(full, C.block_n * kBlockK);
    ptx::tma_load_2d_once(smem.b(pipe.stage), &p.b, full, at.k_block() * kBlockK, at.t.n);
  }
}

// One warp. Scales that TMA cannot read are copied one by one.
template <GemmConfig C>
__device__ void load_activations(const GemmParams& p, const SharedMemory<C>& smem) {
  const int lane = threadIdx.x % 32;
  const u32 bytes = p.rows_a * kBlockK + (p.sfa_by_tma ? C.block_m * 4 : 0);
  auto pipe = smem.activations();
  KBlocks<C> at(p, smem);
  begin<C>();
  ptx::grid_wait_dependencies();
  if (lane == 0) ptx::mbarrier_arrive(smem.begun());
#pragma unroll 1
  for (; at.more; at.advance(), pipe.advance()) {
    const int k_block = at.k_block();
    u64* full = &pipe.full[pipe.stage];
    float* scales = smem.sfa(pipe.stage);
    pipe.wait_empty();
    if (lane == 0) {
      ptx::mbarrier_arrive_expect_tx(full, bytes);
      ptx::tma_load_2d(smem.a(pipe.stage), &p.a, full, k_block * kBlockK, 0);
      if (p.sfa_by_tma) ptx::tma_load_2d(scales, &p.sfa_map, full, 0, k_block);
    }
    if (!p.sfa_by_tma) {
      if (lane < p.m) ptx::cp_async_4(&scales[lane], p.sfa + lane * p.sfa_stride_m + k_block * p.sfa_stride_k);
      ptx::mbarrier_arrive_cp_async(full);
    }
    __syncwarp();
  }
}

// --- consumers ------------------------------------------------------------------------------------------------------

template <GemmConfig C>
struct FewRowsConsumer {
  using Wgmma = ptx::WgmmaE4m3<C.block_m>;
  const GemmParams& p;
  const SharedMemory<C>& smem;
  Pipeline<C.num_stages> pipe;  // at the first k-block of the next tile
  int consumer, lane;
  u64 first_a, first_b;      // descriptors of stage 0
  float acc[C.block_m / 2];  // two columns of D, and of each two neighbouring rows in every 8

  __device__ FewRowsConsumer(const GemmParams& p_, const SharedMemory<C>& smem_, int consumer_)
      : p(p_),
        smem(smem_),
        pipe(smem_.pipeline()),
        consumer(consumer_),
        lane(threadIdx.x % 32),
        first_a(ptx::wgmma_descriptor(smem_.a(0))),
        first_b(ptx::wgmma_descriptor(smem_.b(0))) {}

  // Of stages, a consumer has every num_consumers-th for itself, so that it sees each of their phases.
  __device__ __forceinline__ void multiply(const Tile& t, const KRange& ks) {
    const KOrder order(ks, t.n / C.block_n);
    const float* sfb = p.sfb + min_of(t.n, p.n - 1) / kScaleBlock * p.sfb_stride_n;
    float scale_b = 0;  // of that one of this consumer's next 32 k-blocks which has the lane's number
    auto at = pipe;
    at.advance(consumer);
#pragma unroll
    for (float& x : acc) x = 0;
#pragma unroll 1
    for (int i = consumer, turn = 0; i < order.count; i += C.num_consumers, ++turn, at.advance(C.num_consumers)) {
      if (turn % 32 == 0) scale_b = sfb[order[min_of(i + lane * C.num_consumers, order.count - 1)] * p.sfb_stride_k];
      multiply_k_block(at, __shfl_sync(0xffffffff, scale_b, turn % 32));
    }
    pipe.advance(order.count);
  }

  __device__ __forceinline__ void multiply_k_block(const Pipeline<C.num_stages>& at, float scale_b) {
    float partial[C.block_m / 2], scales[C.block_m / 4];
    at.wait_full();
    ptx::mbarrier_wait(&smem.activations().full[at.stage], at.phase);
    Wgmma::multiply(partial, ptx::wgmma_advance(first_b, at.stage * C.block_n * kBlockK),
                    ptx::wgmma_advance(first_a, at.stage * C.block_m * kBlockK), false);
    const float2* sfa = reinterpret_cast<const float2*>(smem.sfa(at.stage)) + lane % 4;
#pragma unroll
    for (int j = 0; j < C.block_m / 8; ++j) {
      const float2 scale_a = sfa[j * 4];
      scales[j * 2] = scale_a.x * scale_b, scales[j * 2 + 1] = scale_a.y * scale_b;
    }
    ptx::wgmma_wait<0>();
    Wgmma::pin(partial);
    __syncwarp();
    if (lane == 0 || !p.sfa_by_tma) ptx::mbarrier_arrive(&at.empty[at.stage]);
#pragma unroll
    for (int i = 0; i < C.block_m / 2; ++i) acc[i] += scales[i / 4 * 2 + i % 2] * partial[i];
  }
};

// --- sum and store --------------------------------------------------------------------------------------------------

// The parts of a CTA's slice of a tile, in shared memory: [part][column of D][row of D]. A part comes from each
// consumer of each CTA of the cluster.
template <GemmConfig C>
struct SliceSum {
  static constexpr int kColumns = C.block_n / C.split_k, kPitch = C.column_pitch(),
                       kParts = C.split_k * C.num_consumers;
  float* parts;
  u64* full;  // published by whoever sends a part, in bytes; waited for by the consumers: all parts are here

  __device__ void send(const float (&acc)[C.block_m / 2], int part, int rows) const {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = warp * 16 + half * 8 + lane / 4, cta = column / kColumns;
      float* to = parts + (part * kColumns + column % kColumns) * kPitch + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < C.block_m / 8; ++j) {
        const float2 x = make_float2(acc[j * 4 + half * 2], acc[j * 4 + half * 2 + 1]);
        if constexpr (C.split_k == 1)
          *reinterpret_cast<float2*>(to + j * 8) = x;
        else if (j * 8 < rows)
          ptx::store_async_cluster_f2(to + j * 8, x, full, cta);
      }
    }
  }
  static __device__ u32 bytes(int rows) { return kParts * kColumns * ceil_div(rows, 8) * 8 * 4; }

  // All consumers, two columns of a row at a time.
  __device__ void sum_and_store(const GemmParams& p, const Tile& t, int rank) const {
    constexpr int kPairs = kColumns / 2;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.m * kPairs; i += C.num_consumers * kWarpgroup) {
      const int row = i / kPairs, pair = i % kPairs * 2, col = t.n + rank * kColumns + pair;
      const float* x = parts + pair * kPitch + row;
      float2 sum = make_float2(x[0], x[kPitch]);
#pragma unroll
      for (int part = 1; part < kParts; ++part) {
        x += kColumns * kPitch;
        sum.x += x[0], sum.y += x[kPitch];
      }
      if (p.c_ptr != nullptr) {
        const float2 c = RowPiece<C.out>(p.c_ptr, row * p.c_stride + col, p.n - col).load(0);
        sum.x += c.x, sum.y += c.y;
      }
      RowPiece<C.out>(p.d_ptr, row * p.d_stride + col, p.n - col).store(0, sum);
    }
  }
};

template <GemmConfig C>
__device__ void consume_few_rows(const GemmParams& p, const SharedMemory<C>& smem, int consumer) {
  constexpr int kBarrier = 1, kThreads = C.num_consumers * kWarpgroup;
  const int rank = C.split_k > 1 ? int(ptx::cluster_ctarank()) : 0, part = rank * C.num_consumers + consumer;
  const SliceSum<C> slice{smem.partial(), smem.c_full()};
  const KRange ks = my_k_range<C>(p, {});
  auto tiles = my_tiles<C>(p, smem);
  FewRowsConsumer<C> self(p, smem, consumer);
  bool again = false;
  Tile t;
  bool more = tiles.next(t);
  begin<C>();
  ptx::grid_wait_dependencies();
#pragma unroll 1
  for (; more; more = tiles.next(t), again = true) {
    self.multiply(t, ks);
    if constexpr (C.split_k > 1) {  // one tile a cluster
      if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(slice.full, slice.bytes(p.m));
      if (!again) ptx::cluster_wait();  // the peers' barriers are there
      slice.send(self.acc, part, p.m);
      ptx::mbarrier_wait(slice.full, 0);
    } else {
      if (again) ptx::named_barrier_sync(kBarrier, kThreads);  // the tile before has been read
      slice.send(self.acc, part, p.m);
      ptx::named_barrier_sync(kBarrier, kThreads);
    }
    slice.sum_and_store(p, t, rank);
  }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <GemmConfig C>
__device__ __forceinline__ void gemm_fp8_few(const GemmParams& p) {
  static_assert(is_valid(C) && C.few_rows());
  constexpr int kConsumerWarps = C.num_consumers * 4;
  extern __shared__ __align__(1024) u8 smem_base[];
  const SharedMemory<C> smem{smem_base};
  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);

  if (!p.leaves_sms) ptx::grid_launch_dependents();
  if (threadIdx.x == (kConsumerWarps + 2) * 32) {  // of a warp that has nothing else to do
    const auto pipe = smem.pipeline();
    for (int s = 0; s < C.num_stages; ++s) {
      ptx::mbarrier_init(&pipe.full[s], 1);
      ptx::mbarrier_init(&smem.activations().full[s], p.sfa_by_tma ? 1 : 1 + 32);  // and the lanes that copy scales
      // Of one consumer, the warps; or the threads, as cp.async would overwrite scales that each of them has read.
      ptx::mbarrier_init(&pipe.empty[s], p.sfa_by_tma ? 4 : kWarpgroup);
    }
    ptx::mbarrier_init(smem.begun(), 1);  // published when the previous kernel has ended, waited for by stream_weights
    ptx::mbarrier_init(smem.c_full(), 1);
    ptx::fence_mbarrier_init();
  }
  if (threadIdx.x == kConsumerWarps * 32) {
    ptx::prefetch_tensor_map(&p.b);
    ptx::prefetch_tensor_map(&p.a);
    if (p.sfa_by_tma) ptx::prefetch_tensor_map(&p.sfa_map);
  }
  __syncwarp();
  if constexpr (C.split_k > 1) ptx::cluster_arrive();  // waited for before parts are sent

  if (warp == kConsumerWarps)
    stream_weights<C>(p, smem);
  else if (warp == kConsumerWarps + 1)
    load_activations<C>(p, smem);
  else if (warp == kConsumerWarps + 2)
    begin<C>();
  else
    consume_few_rows<C>(p, smem, warp / 4);
}

}  // namespace phalanx
