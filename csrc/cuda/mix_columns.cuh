// The second look of the mixture operators at a row: the mixture at some columns at a time.
#pragma once
#include "mix.cuh"

namespace mdk {

// The tokens of one block of random words.
constexpr int kQuad = 4;

// How many elements of the first model lie between its row and the 16-byte boundary at or below.
// Columns are counted from there where it helps: of contiguous rows of one width, every model's
// accesses are then aligned, whatever the width.
__device__ __forceinline__ int columns_before(const MixModel& m, int64_t row) {
  const void* x = row_of(m, row);
  return m.dtype == kF32 ? misalignment(static_cast<const float*>(x))
                         : misalignment(static_cast<const bf16*>(x));
}

// This block's columns [begin, end); begin is a multiple of kTogether.
struct Columns {
  int begin, end;
};
template <int kTogether>
__host__ __device__ __forceinline__ int columns_per_block(int width, int blocks) {
  const int each = (width + blocks - 1) / blocks;
  return (each + kTogether - 1) / kTogether * kTogether;
}
template <int kTogether>
__device__ __forceinline__ Columns my_columns(int width) {
  const int each = columns_per_block<kTogether>(width, cluster_size());
  const int begin = cluster_rank() * each;
  return {begin, begin + each < width ? begin + each : width};
}

// kCount columns as one access, or as several of 16 bytes.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Several {
  T value[kCount];
};
template <int kCount, class T>
__device__ __forceinline__ void load_from(const T* x, int column, int width, float* out) {
  const T* at = x + column;
  if (column >= 0 && column <= width - kCount &&
      reinterpret_cast<uintptr_t>(at) % alignof(Several<T, kCount>) == 0) {
    if constexpr (kCount * sizeof(T) >= 16) {
#pragma unroll
      for (int i = 0; i < kCount; i += kPerVec<T>) unpack<T>(load16(at + i), out + i);
    } else {
      const Several<T, kCount> v = *reinterpret_cast<const Several<T, kCount>*>(at);
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = to_float(v.value[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    out[i] = column + i >= 0 && column + i < width ? to_float(at[i]) : -INFINITY;
}

// -inf outside the width of the model.
template <int kCount>
__device__ __forceinline__ void load_columns(const MixModel& m, const MixTerm& t, int column,
                                             float* out) {
  const int width = static_cast<int>(m.width);
  if (m.dtype == kF32)
    load_from<kCount>(static_cast<const float*>(m.x) + t.start, column, width, out);
  else if (m.dtype == kBF16)
    load_from<kCount>(static_cast<const bf16*>(m.x) + t.start, column, width, out);
  else
    load_from<kCount>(static_cast<const f16*>(m.x) + t.start, column, width, out);
}

// log(1 + x) for x in [0, 1], absolute error 3e-8 plus rounding; exactly 0 at 0.
__device__ __forceinline__ float log1p_unit(float x) {
  float p = fmaf(0.00538406206362f, x, -0.0301109685962f);
  p = fmaf(p, x, 0.079210751614f);
  p = fmaf(p, x, -0.137466237322f);
  p = fmaf(p, x, 0.191451175029f);
  p = fmaf(p, x, -0.248529461627f);
  p = fmaf(p, x, 0.333203436281f);
  p = fmaf(p, x, -0.499995525949f);
  p = fmaf(p, x, 0.999999974534f);
  return p * x;
}

__device__ __forceinline__ float log_add(float a, float b) {
  // The difference of two -inf is NaN, which fmaxf drops.
  const float exponent = fmaxf(-fabsf(a - b) * kLog2E, -200.0f);
  return fmaxf(a, b) + log1p_unit(exp2_fast(exponent));
}

// log p of a valid row at some columns; -inf where no model reaches.
template <int kCount>
__device__ __forceinline__ void mix_columns(const MixArgs& a, const MixShared& s, int column,
                                            float* out) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = -INFINITY;
  bool first = true;
  for (int k = 0; k < a.count; ++k) {
    const MixTerm t = s.terms[k];
    if (!t.live) continue;
    float x[kCount];
    load_columns<kCount>(a.models[k], t, column, x);
    // x - max comes first because it is exact or nearly so, also for logits around 1e4.
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaf(x[i] - t.max, t.scale, t.offset);
    if (first) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = x[i];
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = log_add(out[i], x[i]);
    }
    first = false;
  }
}

}  // namespace mdk
