#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(MDK_SHIM_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

// This file is itself not instrumented by ThreadSanitizer: the fibers' bookkeeping is shared by
// design, and only one of them ever runs.
namespace mdk::shim {

Fiber* self = nullptr;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr unsigned kNoOrder = 1;  // a switch itself orders nothing

void* scheduler[5];
void* scheduler_tsan;
const void* scheduler_stack;
size_t scheduler_stack_size;
const std::function<void()>* current_kernel;
char start_order, end_order;
std::vector<std::unique_ptr<Fiber>> pool;

void acquire([[maybe_unused]] char* what) {
#if defined(MDK_SHIM_TSAN)
  __tsan_acquire(what);
#endif
}

void release([[maybe_unused]] char* what) {
#if defined(MDK_SHIM_TSAN)
  __tsan_release(what);
#endif
}

// A switch costs some ten instructions: swapcontext would make two system calls of every one.
[[noreturn, gnu::noinline]] void resume(void** context) { __builtin_longjmp(context, 1); }
[[gnu::noinline]] void exchange(void** mine, void** theirs) {
  if (__builtin_setjmp(mine) == 0) resume(theirs);
}

void to_scheduler(Fiber* fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fiber->asan_stack, scheduler_stack, scheduler_stack_size);
#endif
#if defined(MDK_SHIM_TSAN)
  __tsan_switch_to_fiber(scheduler_tsan, kNoOrder);
#endif
  exchange(fiber->context, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber->asan_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void fiber_main();

// A fiber that is new, or was left inside a kernel whose threads wait for ever, starts afresh.
[[gnu::noinline]] void start(Fiber* fiber) {
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = fiber->stack;
  fresh.uc_stack.ss_size = kStack;
  fresh.uc_link = nullptr;
  makecontext(&fresh, fiber_main, 0);
  if (__builtin_setjmp(scheduler) == 0) setcontext(&fresh);
}

void to_fiber(Fiber* fiber) {
  self = fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* mine;
  __sanitizer_start_switch_fiber(&mine, fiber->stack, kStack);
#endif
#if defined(MDK_SHIM_TSAN)
  __tsan_switch_to_fiber(fiber->tsan_fiber, kNoOrder);
#endif
  if (fiber->starts)
    start(fiber);
  else
    exchange(scheduler, fiber->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#endif
}

void fiber_main() {
  Fiber* fiber = self;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  fiber->starts = false;
  for (;;) {
    acquire(&start_order);
    (*current_kernel)();
    release(&end_order);
    fiber->finished = true;
    to_scheduler(fiber);
  }
}

Fiber* fiber(size_t index) {
  while (pool.size() <= index) {
    auto made = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("no memory for a fiber");
    made->stack = static_cast<char*>(stack);
    made->finished = made->starts = true;
#if defined(MDK_SHIM_TSAN)
    made->tsan_fiber = __tsan_create_fiber(0);
#endif
    pool.push_back(std::move(made));
  }
  return pool[index].get();
}

void prepare(Fiber* f, Block* block, int thread) {
  f->thread = thread;
  f->block = block;
  f->warp = &block->warps[static_cast<size_t>(thread / 32)];
  f->copies.clear();
  f->groups = f->exchanges = 0;
  f->starts |= !f->finished;  // left inside a kernel
  f->arrived = false;
  f->finished = false;
  f->waits_at = nullptr;
}

[[noreturn]] void stuck(const std::vector<Fiber*>& fibers) {
  int block = 0, warp = 0, cluster = 0, ended = 0;
  for (const Fiber* f : fibers) {
    if (f->finished)
      ++ended;
    else if (f->waits_at == &f->block->barrier)
      ++block;
    else if (f->waits_at == &f->warp->barrier)
      ++warp;
    else
      ++cluster;
  }
  throw std::runtime_error("deadlock: " + std::to_string(block) +
                           " threads wait at a block barrier, " + std::to_string(warp) +
                           " at a warp barrier, " + std::to_string(cluster) +
                           " at a cluster barrier, " + std::to_string(ended) + " have ended");
}

void run_cluster(const std::vector<Fiber*>& fibers, bool backwards) {
  release(&start_order);
  for (size_t left = fibers.size(); left > 0;) {
    bool progress = false;
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber* f = fibers[backwards ? fibers.size() - 1 - i : i];
      if (f->finished || (f->waits_at && f->waits_at->generation == f->generation)) continue;
      progress = true;
      to_fiber(f);
      if (f->finished) --left;
    }
    if (!progress && left > 0) stuck(fibers);
  }
  acquire(&end_order);
}

}  // namespace

void wait(Barrier& barrier) {
  Fiber* mine = self;
  const unsigned generation = barrier.generation;
  char* order = &barrier.order[generation % 2];
  release(order);
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    mine->waits_at = &barrier;
    mine->generation = generation;
    to_scheduler(mine);
    mine->waits_at = nullptr;
  }
  acquire(order);
}

void run_grid(int64_t blocks, int cluster_size, int threads, size_t shared_bytes,
              const std::function<void()>& kernel) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const char* order = std::getenv("MDK_SHIM_ORDER");
  const bool backwards = order != nullptr && std::strcmp(order, "backwards") == 0;
  current_kernel = &kernel;
#if defined(MDK_SHIM_TSAN)
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  for (int64_t first = 0; first < blocks; first += cluster_size) {
    Cluster cluster;
    cluster.barrier.size = cluster_size * threads;
    std::vector<Fiber*> fibers;
    std::vector<std::unique_ptr<void, void (*)(void*)>> memory;
    for (int rank = 0; rank < cluster_size; ++rank) {
      auto block = std::make_unique<Block>();
      void* shared = nullptr;
      if (posix_memalign(&shared, 128, shared_bytes ? shared_bytes : 1) != 0)
        throw std::runtime_error("no shared memory");
      memory.emplace_back(shared, &std::free);
      std::memset(shared, 0xff, shared_bytes);
      block->index = first + rank;
      block->grid_blocks = blocks;
      block->rank = rank;
      block->threads = threads;
      block->shared = static_cast<char*>(shared);
      block->shared_bytes = shared_bytes;
      block->barrier.size = threads;
      block->warps.resize(static_cast<size_t>(threads / 32));
      for (Warp& warp : block->warps) warp.barrier.size = 32;
      block->cluster = &cluster;
      for (int t = 0; t < threads; ++t) {
        fibers.push_back(fiber(fibers.size()));
        prepare(fibers.back(), block.get(), t);
      }
      cluster.blocks.push_back(std::move(block));
    }
    run_cluster(fibers, backwards);
  }
  self = nullptr;
}

}  // namespace mdk::shim
