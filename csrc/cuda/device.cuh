// Everything a kernel needs from the machine, under names that also exist on the host: with
// MDK_HOST_SHIM the same kernel source is compiled by a C++ compiler over tests/cuda_shim/. A
// kernel uses no other CUDA feature, so that whatever it does is exercised without a GPU. In
// particular: shared memory comes from the one dynamic buffer, shuffles and votes involve whole
// warps, and kernels start through mdk::launch (launch.h).
#pragma once
#include <stdint.h>

#ifdef MDK_HOST_SHIM
#include "device_host.h"
#else

namespace mdk {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- where am I. Blocks of a cluster have consecutive indices.
__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int thread_count() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ int64_t block_count() { return gridDim.x; }
__device__ __forceinline__ int lane_index() { return thread_index() % kWarp; }
__device__ __forceinline__ int warp_index() { return thread_index() / kWarp; }
__device__ __forceinline__ int warp_count() { return thread_count() / kWarp; }

// This block's number within its cluster, and the size of that; 0 and 1 without one.
__device__ __forceinline__ int cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_size() {
  unsigned size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return static_cast<int>(size);
}

// ---- barriers; all order memory among the threads they join
__device__ __forceinline__ void block_sync() { __syncthreads(); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
#else
  __syncthreads();
#endif
}

// ---- shared memory
// The dynamic buffer, 16-byte aligned. Its contents are undefined at the start of a block.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char mdk_shared_memory[];
  return mdk_shared_memory;
}
// The same place in the shared memory of block `rank` of this cluster. That block must have started
// (a cluster_sync since the start of the kernel) and must not have ended (another one before the
// end, unless the access is a store that its reader awaits with one).
template <class T>
__device__ __forceinline__ T* cluster_shared(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;"
      : "=l"(theirs)
      : "l"(reinterpret_cast<uint64_t>(mine)), "r"(static_cast<unsigned>(rank)));
  return reinterpret_cast<T*>(theirs);
#else
  (void)rank;
  return mine;
#endif
}

// ---- warps: every lane of the warp takes part
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <class T>  // from lane - delta; lanes below delta keep their own
__device__ __forceinline__ T shuffle_up(T value, int delta) {
  return __shfl_up_sync(kAllLanes, value, static_cast<unsigned>(delta));
}
__device__ __forceinline__ unsigned ballot(bool set) { return __ballot_sync(kAllLanes, set); }
__device__ __forceinline__ int count_bits(unsigned word) { return __popc(word); }

// ---- integer atomics in shared or global memory; floating point sums must not depend on an order
__device__ __forceinline__ unsigned atomic_or(unsigned* at, unsigned bits) {
  return atomicOr(at, bits);
}
__device__ __forceinline__ unsigned atomic_add(unsigned* at, unsigned value) {
  return atomicAdd(at, value);
}
__device__ __forceinline__ unsigned atomic_cas(unsigned* at, unsigned expected, unsigned value) {
  return atomicCAS(at, expected, value);
}

// ---- 16 bytes at a time
struct alignas(16) Vec16 {
  unsigned word[4];
};

__device__ __forceinline__ Vec16 load16(const void* aligned) {
  return *static_cast<const Vec16*>(aligned);
}
__device__ __forceinline__ void store16(void* aligned, const Vec16& value) {
  *static_cast<Vec16*>(aligned) = value;
}
// Global memory that no thread of this launch writes, and that nobody reads twice.
__device__ __forceinline__ Vec16 load16_once(const void* aligned) {
  Vec16 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(aligned));
  return v;
}
// Global memory that nobody reads soon.
__device__ __forceinline__ void store16_once(void* aligned, const Vec16& v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(aligned), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// ---- 16 bytes from global to shared memory in the background. Each thread waits for its own
// copies; before another thread reads them there must be a barrier after the wait.
__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `kPending` of the committed groups are on their way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Whole 16-byte blocks of global memory are asked for, to be found in the last cache level by the
// loads that follow. Costs one thread one instruction; a hint, and nothing before sm_90.
__device__ __forceinline__ void prefetch_blocks(const void* aligned, int blocks) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(aligned), "r"(blocks * 16)
               : "memory");
#endif
}

// ---- arithmetic
// 2^x with a relative error of 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float bits_to_float(unsigned bits) { return __uint_as_float(bits); }
__device__ __forceinline__ unsigned float_to_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
// Two floats rounded to nearest even, `low` in the low half of the word.
__device__ __forceinline__ unsigned floats_to_halves(float low, float high) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ unsigned floats_to_bfloats(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

}  // namespace mdk
#endif
