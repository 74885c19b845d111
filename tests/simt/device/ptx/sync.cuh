#pragma once
#include "simt.h"

namespace phalanx::ptx {

inline void named_barrier_sync(int id, int num_threads) { simt::meet(simt::cta->barriers[id], num_threads); }
inline void grid_wait_dependencies() {}
inline void grid_launch_dependents() {}

}  // namespace phalanx::ptx
