// Tiles of grouped products, from the thread that finds them to all who work on them:
//
//     producer's thread                  lane 0 of every other warp
//       wait empty[s], write slot s
//       arrive at full[s]       ------>    wait full[s], read
//                               <------    arrive at empty[s]; a warp has the tile by shuffles
//
// The divisions of a scheduler then run once, ahead of the work. And a shuffle tells the compiler that a warp agrees:
// loops over k-blocks whose ends every lane had read from shared memory would keep stages and phases in vector
// registers, 15 % more instructions a k-block, and as much time.
#pragma once
#include "device/gemm/tiles.h"
#include "device/ptx/mbarrier.cuh"

namespace phalanx {

struct TileRing {
  struct alignas(kTileSlotBytes) Slot {
    Tile tile;  // of a group below 0: there are no more
  };
  Slot* slots;
  u64* full;
  u64* empty;
  int slot = 0;
  u32 phase = 0;

  __device__ void put(const Tile& t) {
    ptx::mbarrier_wait(&empty[slot], phase ^ 1);  // the first lap passes at once
    slots[slot].tile = t;
    ptx::mbarrier_arrive(&full[slot]);
    advance();
  }
  __device__ Tile take() const {
    ptx::mbarrier_wait(&full[slot], phase);
    const Tile t = slots[slot].tile;
    ptx::mbarrier_arrive(&empty[slot]);
    return t;
  }
  __device__ void advance() {
    if (++slot == kTileSlots) slot = 0, phase ^= 1;
  }
};

// A warp that takes tiles from the ring, with the interface of a scheduler.
struct TilesOfWarp {
  TileRing ring;

  __device__ bool next(Tile& t) {
    Tile taken{};
    if (threadIdx.x % 32 == 0) taken = ring.take();
    ring.advance();
    const auto from_lane_0 = [](int x) { return __shfl_sync(0xffffffff, x, 0); };
    t = {from_lane_0(taken.m), from_lane_0(taken.n), from_lane_0(taken.group), from_lane_0(taken.group_begin),
         from_lane_0(taken.group_end)};
    return __any_sync(0xffffffff, t.group >= 0);
  }
};

}  // namespace phalanx
