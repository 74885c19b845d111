#include "simt.h"

#include <thread>

namespace simt {
namespace {

constexpr int kStackBytes = 64 << 10;
constexpr int kTurnsOfWarp = 6;  // in a row: what a warp does together needs no round through the others

void run_fiber() {
  (*cta->kernel)();
  fiber().done = true;
  for (;;) yield();
}

void run_cta(int index, int num_threads, const std::function<void()>& kernel) {
  Cta mine;
  mine.index = index;
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
  for (bool alive = true; alive;) {
    alive = false;
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
  cta = nullptr;
}

}  // namespace

void yield() { swapcontext(&fiber().context, &cta->scheduler); }

void launch(int num_ctas, int num_threads, const std::function<void()>& kernel) {
  std::vector<std::jthread> ctas;
  for (int i = 0; i < num_ctas; ++i) ctas.emplace_back(run_cta, i, num_threads, std::cref(kernel));
}

}  // namespace simt
