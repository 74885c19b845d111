#pragma once
#include "simt.h"

namespace phalanx::ptx {

inline bool elect_one() { return simt::lane() == 0; }
template <class Int>
inline void keep_in_register(Int&) {}
template <int kCount>
void register_increase() {}
template <int kCount>
void register_decrease() {}

inline void named_barrier_sync(int id, int num_threads) { simt::meet(simt::cta->barriers[id], num_threads); }

inline bool named_barrier_all(int id, int num_threads, bool mine) {
  simt::Barrier& barrier = simt::cta->barriers[id];
  barrier.vote = barrier.vote && mine;
  if (barrier.arrived + 1 == num_threads) barrier.all = barrier.vote, barrier.vote = true;
  simt::meet(barrier, num_threads);
  return barrier.all;
}

inline void barrier_sync(int id, int num_threads) { named_barrier_sync(id, num_threads); }
inline void named_barrier_arrive(int id, int num_threads) {
  simt::Barrier& barrier = simt::cta->barriers[id];
  if (++barrier.arrived < num_threads) return;
  barrier.arrived = 0;
  ++barrier.turn;
}

inline u32 cluster_ctarank() { return u32(simt::cta->rank); }
inline void cluster_arrive() {
  simt::Cluster& cluster = *simt::cta->cluster;
  const std::lock_guard lock(cluster.mutex);
  simt::fiber().cluster_turn = cluster.turn;
  if (++cluster.arrived == int(cluster.ctas.size() * simt::cta->fibers.size())) cluster.arrived = 0, ++cluster.turn;
}
inline void cluster_wait() {
  simt::Cluster& cluster = *simt::cta->cluster;
  std::unique_lock lock(cluster.mutex);
  while (cluster.turn == simt::fiber().cluster_turn) {
    lock.unlock();
    simt::yield();
    lock.lock();
  }
}
inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

inline void grid_wait_dependencies() {}
inline void grid_launch_dependents() {}

}  // namespace phalanx::ptx
