// logit_mix: the mixture of a row written out in fp32. Reads the logits from memory once (the
// second look finds them in a cache), writes once.
#include "mix_columns.cuh"

namespace mdk {
namespace {

struct LogitMix {
  MixArgs mix;
  bool base_scale;
  float* out;  // (rows, width)
};

constexpr int kTogether = 16;  // columns at a time

__global__ void __launch_bounds__(kMixThreads, 3)
    logit_mix_kernel(const __grid_constant__ LogitMix a) {
  MixShared& s = *reinterpret_cast<MixShared*>(shared_memory());
  const int64_t step = block_count() / cluster_size();
  cluster_sync();  // the others have started
  for (int64_t row = block_index() / cluster_size(); row < a.mix.rows; row += step) {
    const bool valid = mix_terms(a.mix, row, s, false, a.base_scale ? 0 : -1);
    float shift = valid ? 0.0f : NAN;
    if (a.base_scale) shift += s.terms[0].max + s.terms[0].log_sum;
    // The output is aligned likewise.
    const int before = columns_before(a.mix.models[0], row);
    const Columns mine = my_columns<kTogether>(static_cast<int>(a.mix.width) + before);
    float* out = a.out + row * a.mix.width - before;
    for (int c = mine.begin + kTogether * thread_index(); c < mine.end;
         c += kTogether * thread_count()) {
      float p[kTogether];
      mix_columns<kTogether>(a.mix, s, c - before, p);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) p[i] += shift;
      if (c >= before && c + kTogether <= mine.end &&
          reinterpret_cast<uintptr_t>(out + c) % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kTogether; i += kPerVec<float>)
          store16_once(out + c + i, pack<float>(p + i));
        continue;
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (c + i >= before && c + i < mine.end) out[c + i] = p[i];
    }
    if (row + step < a.mix.rows) cluster_sync();  // the next row reuses the shared memory
  }
}

}  // namespace

void logit_mix(Arguments& in) {
  LogitMix a;
  a.mix = MixArgs::read(in);
  a.base_scale = in.integer() != 0;
  a.out = in.pointer<float>();
  const Grid grid = mix_grid(in, a.mix, sizeof(MixShared));
  in.done();
  if (a.mix.rows > 0) launch<logit_mix_kernel>(grid, a);
}

}  // namespace mdk
