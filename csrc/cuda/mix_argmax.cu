// mix_argmax: the most probable token of the mixture, in one launch.
#include "mix_columns.cuh"

namespace mdk {
namespace {

struct MixArgmax {
  MixArgs mix;
  int64_t* ids;  // (rows)
};

constexpr int kTogether = 16;  // columns at a time

// Minus what columns are compared by: their probability, but the logit itself where one model is
// alone, which is exact.
__device__ __forceinline__ void column_keys(const MixArgs& a, const MixShared& s, int column,
                                            bool single, float* keys) {
#pragma unroll
  for (int i = 0; i < kTogether; ++i) keys[i] = 0.0f;
  for (int k = 0; k < a.count; ++k) {
    const MixTerm t = s.terms[k];
    if (!t.live) continue;
    float x[kTogether];
    load_columns<kTogether>(a.models[k], t, column, x);
    const float coefficient = exp2_fast(t.offset * kLog2E), slope = t.scale * kLog2E;
    if (single) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) keys[i] = -x[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      keys[i] = fmaf(-coefficient, exp2_fast((x[i] - t.max) * slope), keys[i]);
  }
}

__global__ void __launch_bounds__(kMixThreads, 3)
    mix_argmax_kernel(const __grid_constant__ MixArgmax a) {
  MixShared& s = *reinterpret_cast<MixShared*>(shared_memory());
  const int64_t step = block_count() / cluster_size();
  cluster_sync();  // the others have started
  for (int64_t row = block_index() / cluster_size(); row < a.mix.rows; row += step) {
    const bool valid = mix_terms(a.mix, row, s, false, -1);
    int live = 0;
    for (int k = 0; k < a.mix.count; ++k) live += s.terms[k].live;
    // A column outside the row, or masked in all models, is not less.
    Best<float> best = {live == 1 ? INFINITY : 0.0f, -1};
    const int before = columns_before(a.mix.models[0], row);
    const Columns mine = my_columns<kTogether>(static_cast<int>(a.mix.width) + before);
    for (int c = mine.begin + kTogether * thread_index(); c < mine.end;
         c += kTogether * thread_count()) {
      float keys[kTogether];
      column_keys(a.mix, s, c - before, live == 1, keys);
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (keys[i] < best.key) best = {keys[i], c + i - before};
    }
    best = cluster_best(best, s, 0);
    if (cluster_rank() == 0 && thread_index() == 0) a.ids[row] = valid ? best.id : -1;
    if (row + step < a.mix.rows) cluster_sync();  // the next row reuses the shared memory
  }
}

}  // namespace

void mix_argmax(Arguments& in) {
  MixArgmax a;
  a.mix = MixArgs::read(in);
  a.ids = in.pointer<int64_t>();
  const Grid grid = mix_grid(in, a.mix, sizeof(MixShared));
  in.done();
  if (a.mix.rows > 0) launch<mix_argmax_kernel>(grid, a);
}

}  // namespace mdk
