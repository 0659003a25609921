// The instructions of PTX as translate.py calls them, on the fibers of tests/cuda_shim. Registers
// are unsigned integers of their size, or bool; an instruction's type says how to read one. A
// shared address is an offset into the block's shared memory, any other address a host pointer.
// What a GPU would trap at ends the process with a message: an address that is not a multiple of
// the access, or outside shared memory.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstring>

#include "arithmetic.h"
#include "table.h"

namespace ptx {

// ---- addresses
template <class T, int kCount>
T* aligned(uint64_t address) {
  if (address % (sizeof(T) * kCount) != 0) trap("misaligned address");
  return reinterpret_cast<T*>(address);
}
template <class T, int kCount>
T* global_at(uint64_t address) {
  return aligned<T, kCount>(address);
}
template <class T, int kCount>
T* param_at(uint64_t address) {
  return aligned<T, kCount>(address);
}
inline uint64_t from_shared(uint64_t offset) {
  return reinterpret_cast<uint64_t>(mdk::shared_memory()) + offset;
}
inline uint64_t to_shared(uint64_t address) {
  return address - reinterpret_cast<uint64_t>(mdk::shared_memory());
}
template <class T, int kCount>
T* shared_at(uint64_t offset) {
  offset = static_cast<uint32_t>(offset);
  if (offset + sizeof(T) * kCount > mdk::shim::self->block->shared_bytes)
    trap("address outside shared memory");
  return aligned<T, kCount>(from_shared(offset));
}
inline uint64_t op_mapa(uint64_t address, uint32_t rank) {
  if (rank >= static_cast<uint32_t>(mdk::cluster_size())) trap("no such block in the cluster");
  return reinterpret_cast<uint64_t>(
      mdk::cluster_shared(reinterpret_cast<char*>(address), static_cast<int>(rank)));
}
inline void copy_async(uint64_t to, uint64_t from) {
  mdk::copy_async16(shared_at<uint32_t, 4>(to), aligned<uint32_t, 4>(from));
}
inline void prefetch(uint64_t from, uint32_t bytes) {
  if (bytes % 16 != 0 || from % 16 != 0 || bytes == 0) trap("bulk prefetch of no whole blocks");
  mdk::prefetch_blocks(reinterpret_cast<void*>(from), static_cast<int>(bytes / 16));
}
template <class T>
T atomic_add(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_add(value);
}
template <class T>
T atomic_or(T* at, T value) {
  return std::atomic_ref<T>(*at).fetch_or(value);
}
template <class T>
T atomic_cas(T* at, T expected, T value) {
  std::atomic_ref<T>(*at).compare_exchange_strong(expected, value);
  return expected;
}

// ---- barriers and warps. A mask must name the whole warp.
inline void full(uint32_t mask) {
  if (mask != mdk::kAllLanes) trap("a mask of less than the warp");
}
inline void warp_sync(uint32_t mask) {
  full(mask);
  mdk::warp_sync();
}
inline void cluster_wait() {
  if (!mdk::shim::self->arrived) trap("wait at the cluster barrier without arriving");
  mdk::shim::self->arrived = false;
  mdk::cluster_sync();
}

template <class T>
struct Shuffled {
  T value;
  bool inside;
};
// c: the segment's mask in bits 8-12, the bound of the lane in bits 0-4.
inline Shuffled<uint32_t> shuffle_from(uint32_t value, int lane, bool inside, uint32_t mask) {
  full(mask);
  return {mdk::shuffle(value, inside ? lane : mdk::lane_index()), inside};
}
inline Shuffled<uint32_t> shuffle_bfly(uint32_t a, uint32_t b, uint32_t c, uint32_t mask) {
  const uint32_t lane = mdk::lane_index(), segment = c >> 8 & 31;
  const uint32_t most = (lane & segment) | (c & 31 & ~segment), from = lane ^ (b & 31);
  return shuffle_from(a, static_cast<int>(from), from <= most, mask);
}
inline Shuffled<uint32_t> shuffle_idx(uint32_t a, uint32_t b, uint32_t c, uint32_t mask) {
  const uint32_t lane = mdk::lane_index(), segment = c >> 8 & 31;
  const uint32_t most = (lane & segment) | (c & 31 & ~segment);
  const uint32_t from = (lane & segment) | (b & 31 & ~segment);
  return shuffle_from(a, static_cast<int>(from), from <= most, mask);
}
inline Shuffled<uint32_t> shuffle_up(uint32_t a, uint32_t b, uint32_t c, uint32_t mask) {
  const int lane = mdk::lane_index(), segment = static_cast<int>(c >> 8 & 31);
  const int least = (lane & segment) | (static_cast<int>(c & 31) & ~segment);
  const int from = lane - static_cast<int>(b & 31);
  return shuffle_from(a, from, from >= least, mask);
}
inline Shuffled<uint32_t> shuffle_down(uint32_t a, uint32_t b, uint32_t c, uint32_t mask) {
  const uint32_t lane = mdk::lane_index(), segment = c >> 8 & 31;
  const uint32_t most = (lane & segment) | (c & 31 & ~segment), from = lane + (b & 31);
  return shuffle_from(a, static_cast<int>(from), from <= most, mask);
}
inline uint32_t vote_ballot(bool set, uint32_t mask) {
  full(mask);
  return mdk::ballot(set);
}
template <class T, class F>
T redux(T value, uint32_t mask, F combine) {
  full(mask);
  for (int distance = 16; distance > 0; distance /= 2)
    value = combine(value, mdk::shuffle_xor(value, distance));
  return value;
}
template <class T>
T redux_max(T value, uint32_t mask) {
  return redux(value, mask, op_max<T>);
}
template <class T>
T redux_min(T value, uint32_t mask) {
  return redux(value, mask, op_min<T>);
}
template <class T>
T redux_add(T value, uint32_t mask) {
  return redux(value, mask, op_add<T>);
}
// ldmatrix x4: lanes 8i to 8i+7 name the rows of matrix i; a lane gets two elements of row lane/4.
inline void load_matrices(uint64_t address, uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d) {
  uint32_t* out[] = {&a, &b, &c, &d};
  const int lane = mdk::lane_index();
  for (int i = 0; i < 4; ++i) {
    const uint64_t row = mdk::shuffle(address, 8 * i + lane / 4);
    shared_at<uint32_t, 4>(row);
    std::memcpy(out[i], shared_at<uint32_t, 1>(row + 4 * (lane % 4)), 4);
  }
}

}  // namespace ptx

using namespace ptx;
