// csrc/cuda/device.cuh on the host. A CUDA thread is a fiber; see fibers.h. Included by device.cuh.
#pragma once
#include <cmath>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace mdk {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline int thread_index() { return shim::self->thread; }
inline int thread_count() { return shim::self->block->threads; }
inline int64_t block_index() { return shim::self->block->index; }
inline int64_t block_count() { return shim::self->block->grid_blocks; }
inline int lane_index() { return thread_index() % kWarp; }
inline int warp_index() { return thread_index() / kWarp; }
inline int warp_count() { return thread_count() / kWarp; }
inline int cluster_rank() { return shim::self->block->rank; }
inline int cluster_size() { return shim::self->block->cluster->size(); }

inline void block_sync() { shim::wait(shim::self->block->barrier); }
inline void warp_sync() { shim::wait(shim::self->warp->barrier); }
inline void cluster_sync() { shim::wait(shim::self->block->cluster->barrier); }

inline char* shared_memory() { return shim::self->block->shared; }

template <class T>
T* cluster_shared(T* mine, int rank) {
  const auto offset = reinterpret_cast<char*>(mine) - shared_memory();
  return reinterpret_cast<T*>(shim::self->block->cluster->blocks[rank]->shared + offset);
}

// Every lane's value, through one slot per lane and a barrier. A lane that is ahead writes the
// other half of the slots, and comes back to this half when all have read it.
inline uint64_t* exchange(uint64_t mine) {
  auto* slots = shim::self->warp->slots[shim::self->exchanges++ % 2];
  slots[lane_index()] = mine;
  warp_sync();
  return slots;
}
template <class T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t mine = 0;
  std::memcpy(&mine, &value, sizeof(T));
  std::memcpy(&value, exchange(mine) + (lane & 31), sizeof(T));
  return value;
}
template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle(value, lane_index() ^ mask);
}
template <class T>
T shuffle_up(T value, int delta) {
  const int lane = lane_index() - delta;
  return shuffle(value, lane < 0 ? lane_index() : lane);
}
inline unsigned ballot(bool set) {
  const auto* slots = exchange(set);
  unsigned word = 0;
  for (int lane = 0; lane < kWarp; ++lane) word |= static_cast<unsigned>(slots[lane]) << lane;
  return word;
}
inline int count_bits(unsigned word) { return __builtin_popcount(word); }

inline unsigned atomic_or(unsigned* at, unsigned bits) {
  return std::atomic_ref<unsigned>(*at).fetch_or(bits, std::memory_order_relaxed);
}
inline unsigned atomic_add(unsigned* at, unsigned value) {
  return std::atomic_ref<unsigned>(*at).fetch_add(value, std::memory_order_relaxed);
}
inline unsigned atomic_cas(unsigned* at, unsigned expected, unsigned value) {
  std::atomic_ref<unsigned>(*at).compare_exchange_strong(expected, value,
                                                         std::memory_order_relaxed);
  return expected;
}

struct alignas(16) Vec16 {
  unsigned word[4];
};
// Through a typed pointer, so that UBSAN sees the alignment.
inline Vec16 load16(const void* aligned) { return *static_cast<const Vec16*>(aligned); }
inline void store16(void* aligned, const Vec16& value) { *static_cast<Vec16*>(aligned) = value; }
inline Vec16 load16_once(const void* aligned) { return load16(aligned); }
inline void store16_once(void* aligned, const Vec16& value) { store16(aligned, value); }

// As late as the hardware may: at the wait.
inline void copy_async16(void* shared, const void* global) {
  shim::self->copies.push_back({shared, global, shim::self->groups});
}
inline void prefetch_blocks(const void* aligned, int blocks) {
  if (reinterpret_cast<uintptr_t>(aligned) % 16 != 0) std::abort();
  const auto* block = static_cast<const Vec16*>(aligned);
  // Both ends must be inside the tensor.
  const volatile unsigned touched = block[0].word[0] + block[blocks - 1].word[3];
  (void)touched;
}
inline void copy_async_commit() { ++shim::self->groups; }
template <int kPending>
void copy_async_wait() {
  auto& copies = shim::self->copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < shim::self->groups - kPending; ++done)
    store16(copies[done].shared, load16(copies[done].global));
  copies.erase(copies.begin(), copies.begin() + static_cast<long>(done));
}

inline float bits_to_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned float_to_bits(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float half_to_float(uint16_t bits) {
  const unsigned sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude << 13));
  // An exact product also for subnormal halves.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}
inline unsigned float_to_half(float x) {
  const unsigned bits = float_to_bits(x), sign = (bits >> 16) & 0x8000u;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7fffu;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  const float step = magnitude < 0x1p-14f ? 0x1p-24f : std::exp2(std::ilogb(magnitude) - 10.0f);
  const float rounded = std::nearbyint(magnitude / step) * step;  // all exact but nearbyint
  if (rounded < 0x1p-14f) return sign | static_cast<unsigned>(rounded * 0x1p24f);
  return sign | ((float_to_bits(rounded) - 0x38000000u) >> 13);
}
inline unsigned floats_to_halves(float low, float high) {
  return float_to_half(low) | float_to_half(high) << 16;
}
inline unsigned float_to_bfloat(float x) {
  if (std::isnan(x)) return 0x7fffu;
  const unsigned bits = float_to_bits(x);
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline unsigned floats_to_bfloats(float low, float high) {
  return float_to_bfloat(low) | float_to_bfloat(high) << 16;
}

}  // namespace mdk
