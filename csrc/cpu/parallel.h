// Rows over threads. torch's thread count comes in as an argument; the OpenMP runtime is the one
// torch has loaded (same soname), so the two never oversubscribe the cores. Built without OpenMP
// everything runs on the calling thread.
#pragma once
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
constexpr bool mdk_has_openmp = true;
#else
constexpr bool mdk_has_openmp = false;
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
#endif

namespace mdk {

// True in a child of fork(): its copy of the OpenMP pool has no threads behind it, so entering a
// parallel region would hang. Work then runs on the calling thread.
bool after_fork();

inline int usable_threads(int64_t work_items, int requested) {
  if (!mdk_has_openmp || after_fork() || requested < 1) return 1;
  const int64_t threads = work_items < requested ? work_items : requested;
  return threads < 1 ? 1 : static_cast<int>(threads);
}

// Calls body(thread, begin, end) over chunks of [0, rows). Chunks are handed out dynamically, so a
// core taken away by another process delays one chunk and not half of the work.
template <class Body>
void parallel_rows(int64_t rows, int requested, int64_t chunk, Body&& body) {
  const int threads = usable_threads((rows + chunk - 1) / chunk, requested);
  if (threads == 1) {
    if (rows > 0) body(0, int64_t{0}, rows);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = begin + chunk < rows ? begin + chunk : rows;
    body(omp_get_thread_num(), begin, end);
  }
}

// Large fresh outputs: ask for 2 MB pages before the first touch. On a stock allocator page faults
// cost several times the kernel itself. A refusal by the kernel is harmless and ignored.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace mdk
