// grad *= factor, one for all rows or one per row, read on the device: no synchronisation, and
// nothing moves where the factor is 1.
#include "launch.h"
#include "numbers.cuh"

namespace mdk {
namespace {

struct ScaleRows {
  void* grad;          // (rows, vocab), unit stride within a row
  int64_t row_stride;  // elements
  int64_t rows, vocab;
  const float* factor;
  int64_t factor_stride;  // 0: one for all
};

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // 16-byte loads of a thread in flight

template <class T>
__device__ __forceinline__ void scale16(T* at, const Vec16& raw, float factor) {
  float x[kPerVec<T>];
  unpack<T>(raw, x);
#pragma unroll
  for (int e = 0; e < kPerVec<T>; ++e) x[e] *= factor;
  store16_once(at, pack<T>(x));
}

template <class T>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(const ScaleRows a) {
  constexpr int kPer = kPerVec<T>;
  const int step = thread_count();
  for (int64_t row = block_index(); row < a.rows; row += block_count()) {
    const float factor = a.factor[row * a.factor_stride];
    if (factor == 1.0f) continue;
    T* grad = static_cast<T*>(a.grad) + row * a.row_stride;
    const int shift = misalignment(grad);
    const int64_t vectors = (a.vocab + shift + kPer - 1) / kPer;
    T* aligned = grad - shift;
    for (int64_t v = thread_index(); v < vectors;) {
      if (v == 0 || v == vectors - 1) {  // partly outside the row
        for (int64_t i = v * kPer - shift, e = 0; e < kPer; ++i, ++e)
          if (i >= 0 && i < a.vocab) grad[i] = from_float<T>(to_float(grad[i]) * factor);
        v += step;
      } else if (v + (kAtOnce - 1) * step < vectors - 1) {
        Vec16 raw[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) raw[i] = load16(aligned + (v + i * step) * kPer);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) scale16(aligned + (v + i * step) * kPer, raw[i], factor);
        v += kAtOnce * step;
      } else {
        scale16(aligned + v * kPer, load16(aligned + v * kPer), factor);
        v += step;
      }
    }
  }
}

}  // namespace

void scale_rows(Arguments& in) {
  ScaleRows a;
  a.grad = in.pointer<void>();
  a.row_stride = in.integer();
  a.rows = in.integer();
  a.vocab = in.integer();
  const int64_t dtype = in.integer();
  a.factor = in.pointer<float>();
  a.factor_stride = in.integer();
  in.done();
  if (a.rows == 0) return;
  Grid grid;
  grid.threads = kThreads;
  // Two rounds of full multiprocessors: more blocks would take longer to start than to see a 1.
  const int64_t most = 16 * current_device().multiprocessors;
  grid.blocks = a.rows < most ? a.rows : most;
  grid.stream = in.stream;
  if (dtype == kF32)
    launch<scale_rows_kernel<float>>(grid, a);
  else if (dtype == kBF16)
    launch<scale_rows_kernel<bf16>>(grid, a);
  else
    launch<scale_rows_kernel<f16>>(grid, a);
}

}  // namespace mdk
