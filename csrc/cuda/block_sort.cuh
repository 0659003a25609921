// Ascending bitonic sort of 64-bit keys by a block, kPer consecutive ones in the registers of each
// thread. Keys less than kPer apart meet inside a thread, less than 32 kPer apart inside a warp;
// only the widest steps go through shared memory: 3 of the 55 steps of 1024 keys.
#pragma once
#include "device.cuh"

namespace mdk {

constexpr int kMostThreads = 512;  // leaves a thread 128 registers
constexpr int kMostWarps = kMostThreads / kWarp;
constexpr uint64_t kNoKey = ~uint64_t{0};  // sorts behind every key

__device__ __forceinline__ void order(uint64_t& low, uint64_t& high, bool ascending) {
  const bool swap = (low > high) == ascending;
  const uint64_t a = swap ? high : low, b = swap ? low : high;
  low = a;
  high = b;
}

// The steps of width `first`, first / 2 ... 1 of a merge, all within a thread.
template <int kPer>
__device__ __forceinline__ void merge_in_thread(uint64_t* keys, bool ascending) {
#pragma unroll
  for (int width = kPer / 2; width > 0; width /= 2)
#pragma unroll
    for (int e = 0; e < kPer; ++e)
      if ((e & width) == 0) order(keys[e], keys[e | width], ascending);
}

// Sorts the first `length` keys of the block, a power of two, at least kPer and at most
// kPer * threads; what the others become is undefined. `exchange` holds kPer * threads keys and is
// free again on return (a barrier has passed since its last use).
template <int kPer>
__device__ void block_sort(uint64_t (&keys)[kPer], int length, uint64_t* exchange) {
  const int thread = thread_index(), first = thread * kPer;
#pragma unroll
  for (int run = 2; run < kPer; run *= 2)
#pragma unroll
    for (int width = run / 2; width > 0; width /= 2)
#pragma unroll
      for (int e = 0; e < kPer; ++e)
        if ((e & width) == 0) order(keys[e], keys[e | width], (e & run) == 0);
  merge_in_thread<kPer>(keys, (first & kPer) == 0 || length == kPer);

  for (int run = 2 * kPer; run <= length; run *= 2) {
    const bool ascending = (first & run) == 0;
    int width = run / 2;
    for (; width >= kWarp * kPer; width /= 2) {
      const int partner = thread ^ (width / kPer);
      const bool takes_low = ((first & width) == 0) == ascending;
      // Key e of neighbouring threads side by side: no bank conflicts.
#pragma unroll
      for (int e = 0; e < kPer; ++e) exchange[e * thread_count() + thread] = keys[e];
      block_sync();
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const uint64_t other = exchange[e * thread_count() + partner];
        keys[e] = (other < keys[e]) == takes_low ? other : keys[e];
      }
      block_sync();
    }
    for (; width >= kPer; width /= 2) {
      const bool takes_low = ((first & width) == 0) == ascending;
#pragma unroll
      for (int e = 0; e < kPer; ++e) {
        const uint64_t other = shuffle_xor(keys[e], width / kPer);
        keys[e] = (other < keys[e]) == takes_low ? other : keys[e];
      }
    }
    merge_in_thread<kPer>(keys, ascending);
  }
}

}  // namespace mdk
