#include "simt.h"

#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace phalanx {
alignas(1024) thread_local unsigned char smem_base[228 << 10];
}

namespace simt {
namespace {

constexpr int kStackBytes = 64 << 10;
constexpr auto kPatience = std::chrono::minutes(5);
constexpr int kTurnsOfWarp = 6;  // in a row: what a warp does together needs no round through the others

void run_fiber() {
  (*cta->kernel)();
  fiber().done = true;
  for (;;) yield();
}

// Some of what is under way arrives; all of it, in the end.
void arrive(Cta& cta, bool all) {
  for (std::size_t i = 0; i < cta.under_way.size();) {
    cta.random = cta.random * 1664525 + 1013904223;
    if (!all && cta.random >> 30 != 0) {
      ++i;
      continue;
    }
    const auto action = std::move(cta.under_way[i]);
    cta.under_way.erase(cta.under_way.begin() + i);
    action();
  }
}

void run_cta(int index, int num_ctas, int num_threads, const std::function<void()>& kernel, Cluster& cluster,
             std::barrier<>& all_here) {
  Cta mine;
  mine.index = index;
  mine.num_ctas = num_ctas;
  mine.cluster = &cluster;
  mine.rank = index % int(cluster.ctas.size());
  mine.random = index + 1;
  mine.shared = phalanx::smem_base;
  std::memset(mine.shared, 0xff, sizeof phalanx::smem_base);
  cluster.ctas[mine.rank] = &mine;
  mine.kernel = &kernel;
  mine.fibers.resize(num_threads);
  mine.warps.resize(num_threads / kWarp);
  cta = &mine;
  for (Fiber& f : mine.fibers) {
    f.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
  }
  all_here.arrive_and_wait();
  const auto end = std::chrono::steady_clock::now() + kPatience;
  for (bool alive = true; alive;) {
    alive = false;
    arrive(mine, false);
    if (std::chrono::steady_clock::now() > end) {
      std::fprintf(stderr, "simt: CTA %d waits for what does not come\n", index);
      std::abort();
    }
    for (int first = 0; first < num_threads; first += kWarp) {
      for (int turn = 0; turn < kTurnsOfWarp; ++turn) {
        for (int i = first; i < first + kWarp; ++i) {
          if (mine.fibers[i].done) continue;
          alive = true;
          mine.current = i;
          swapcontext(&mine.scheduler, &mine.fibers[i].context);
        }
      }
    }
    std::this_thread::yield();
  }
  arrive(mine, true);
  cta = nullptr;
}

}  // namespace

void yield() { swapcontext(&fiber().context, &cta->scheduler); }

void launch(int num_ctas, int num_threads, const std::function<void()>& kernel, int cluster_size) {
  std::deque<Cluster> clusters(num_ctas / cluster_size);
  for (Cluster& cluster : clusters) cluster.ctas.resize(cluster_size);
  std::barrier all_here(num_ctas);
  std::vector<std::jthread> ctas;
  for (int i = 0; i < num_ctas; ++i)
    ctas.emplace_back(run_cta, i, num_ctas, num_threads, std::cref(kernel), std::ref(clusters[i / cluster_size]),
                      std::ref(all_here));
}

}  // namespace simt
