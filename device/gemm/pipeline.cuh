// The ring of shared-memory stages between the producers and the consumers of one CTA.
#pragma once
#include "device/ptx/mbarrier.cuh"

namespace phalanx {

template <int kNumStages>
struct Pipeline {
  u64* full;   // full[s]: published by TMA and the scale warp, waited for by the consumers: stage s holds a k-block
  u64* empty;  // empty[s]: published by every consumer warp that reads stage s, waited for by the producers
  int stage = 0;
  u32 phase = 0;

  __device__ void advance() {
    if (++stage == kNumStages) stage = 0, phase ^= 1;
  }
  __device__ void advance(int count) {
    stage += count;
    phase ^= stage / kNumStages & 1;
    stage %= kNumStages;
  }
  __device__ void wait_empty() const { ptx::mbarrier_wait(&empty[stage], phase ^ 1); }  // the first lap passes at once
  __device__ void wait_full() const { ptx::mbarrier_wait(&full[stage], phase); }
};

}  // namespace phalanx
