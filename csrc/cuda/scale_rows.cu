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

template <class T>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(const ScaleRows a) {
  constexpr int kPer = kPerVec<T>;
  for (int64_t row = block_index(); row < a.rows; row += block_count()) {
    const float factor = a.factor[row * a.factor_stride];
    if (factor == 1.0f) continue;
    T* grad = static_cast<T*>(a.grad) + row * a.row_stride;
    const int shift = misalignment(grad);
    const int64_t vectors = (a.vocab + shift + kPer - 1) / kPer;
    for (int64_t v = thread_index(); v < vectors; v += thread_count()) {
      T* at = grad + (v * kPer - shift);
      if (v != 0 && v != vectors - 1) {
        float x[kPer];
        unpack<T>(load16(at), x);
#pragma unroll
        for (int e = 0; e < kPer; ++e) x[e] *= factor;
        store16_once(at, pack<T>(x));
        continue;
      }
      for (int e = 0; e < kPer; ++e)
        if (at + e >= grad && at + e < grad + a.vocab)
          at[e] = from_float<T>(to_float(at[e]) * factor);
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
  grid.blocks = a.rows < kMostGridBlocks ? a.rows : kMostGridBlocks;
  grid.stream = in.stream;
  if (dtype == kF32)
    launch<scale_rows_kernel<float>>(grid, a);
  else if (dtype == kBF16)
    launch<scale_rows_kernel<bf16>>(grid, a);
  else
    launch<scale_rows_kernel<f16>>(grid, a);
}

}  // namespace mdk
