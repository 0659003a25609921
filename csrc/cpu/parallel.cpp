#include "parallel.h"

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>

namespace mdk {
namespace {

std::atomic<bool> forked{false};

void mark_forked() { forked.store(true); }

__attribute__((constructor)) void watch_forks() { pthread_atfork(nullptr, nullptr, mark_forked); }

}  // namespace

bool after_fork() { return forked.load(std::memory_order_relaxed); }

void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + huge - 1) & ~(huge - 1);
  const uintptr_t last =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(huge - 1);
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace mdk
