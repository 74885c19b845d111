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

// Functions of their own, of which callers know nothing: others run before they return, and use every register.
[[noreturn, gnu::noipa]] void jump(Context& to) { __builtin_longjmp(to, 1); }

// Lets a fiber go on until it yields.
[[gnu::noipa]] void resume(Fiber& f, Context& scheduler) {
  if (__builtin_setjmp(scheduler) != 0) return;
  jump(f.context);
}

// Stacks of fibers that are done, for others: new memory costs more than what most fibers do.
class Stacks {
 public:
  std::unique_ptr<char[]> take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) return std::make_unique_for_overwrite<char[]>(kStackBytes);
    auto stack = std::move(free_.back());
    free_.pop_back();
    return stack;
  }
  void give(std::unique_ptr<char[]> stack) {
    const std::lock_guard lock(mutex_);
    free_.push_back(std::move(stack));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<char[]>> free_;
};
Stacks stacks;

// A fiber begins with `run`, which never returns, as if it had been called.
void prepare(Fiber& f, void (*run)()) {
  f.stack = stacks.take();
  const auto end = reinterpret_cast<std::uintptr_t>(f.stack.get() + kStackBytes) / 16 * 16;
#ifdef __x86_64__
  const std::uintptr_t stack = end - 8;  // where the caller's address would be
#else
  const std::uintptr_t stack = end;
#endif
  f.context[0] = reinterpret_cast<void*>(stack);
  f.context[1] = reinterpret_cast<void*>(run);
  f.context[2] = reinterpret_cast<void*>(stack);
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
  for (Fiber& f : mine.fibers) prepare(f, run_fiber);
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
          resume(mine.fibers[i], mine.scheduler);
        }
      }
    }
    std::this_thread::yield();
  }
  arrive(mine, true);
  for (Fiber& f : mine.fibers) stacks.give(std::move(f.stack));
  cta = nullptr;
}

}  // namespace

[[gnu::noipa]] void yield() {
  if (__builtin_setjmp(fiber().context) == 0) jump(cta->scheduler);
}

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
