// The logits dtypes: storage types, widening loads, rounding stores, 16 bytes at a time.
#pragma once
#include "device.cuh"

namespace mdk {

enum Dtype { kF32 = 0, kBF16 = 1, kF16 = 2 };  // as native.DTYPE_CODE

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
constexpr int kPerVec = 16 / static_cast<int>(sizeof(T));  // elements in a Vec16

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
  return bits_to_float(static_cast<unsigned>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 x) { return half_to_float(x.bits); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return bf16{static_cast<uint16_t>(floats_to_bfloats(x, 0.0f) & 0xffffu)};
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return f16{static_cast<uint16_t>(floats_to_halves(x, 0.0f) & 0xffffu)};
}

// Element i of a tensor whose dtype is known at run time only.
__device__ __forceinline__ float load_as_float(const void* at, int dtype, int64_t i) {
  if (dtype == kF32) return static_cast<const float*>(at)[i];
  if (dtype == kBF16) return to_float(static_cast<const bf16*>(at)[i]);
  return to_float(static_cast<const f16*>(at)[i]);
}

// out[0 .. kPerVec<T>) in memory order.
template <class T>
__device__ __forceinline__ void unpack(const Vec16& v, float* out);
template <>
__device__ __forceinline__ void unpack<float>(const Vec16& v, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = bits_to_float(v.word[i]);
}
template <>
__device__ __forceinline__ void unpack<bf16>(const Vec16& v, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = bits_to_float(v.word[i] << 16);
    out[2 * i + 1] = bits_to_float(v.word[i] & 0xffff0000u);
  }
}
template <>
__device__ __forceinline__ void unpack<f16>(const Vec16& v, float* out) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = half_to_float(static_cast<uint16_t>(v.word[i] & 0xffffu));
    out[2 * i + 1] = half_to_float(static_cast<uint16_t>(v.word[i] >> 16));
  }
}

template <class T>
__device__ __forceinline__ Vec16 pack(const float* in);
template <>
__device__ __forceinline__ Vec16 pack<float>(const float* in) {
  Vec16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = float_to_bits(in[i]);
  return v;
}
template <>
__device__ __forceinline__ Vec16 pack<bf16>(const float* in) {
  Vec16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = floats_to_bfloats(in[2 * i], in[2 * i + 1]);
  return v;
}
template <>
__device__ __forceinline__ Vec16 pack<f16>(const float* in) {
  Vec16 v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.word[i] = floats_to_halves(in[2 * i], in[2 * i + 1]);
  return v;
}

// How many elements of T lie between the 16-byte boundary at or below `at` and `at`. Rows of an odd
// vocabulary start anywhere, so kernels number the 16-byte blocks of memory that a row touches:
// block v holds columns v * kPerVec - misalignment onwards, and only the first and the last block
// can be partly outside the row.
template <class T>
__device__ __forceinline__ int misalignment(const T* at) {
  return static_cast<int>((reinterpret_cast<uintptr_t>(at) & 15u) / sizeof(T));
}

}  // namespace mdk
