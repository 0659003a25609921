// logit_mix: the mixture of a row written out in fp32. Reads the logits from memory once (the
// second look finds them in a cache), writes once.
#include "mix.cuh"

namespace mdk {
namespace {

struct LogitMix {
  MixArgs mix;
  bool base_scale;
  float* out;  // (rows, width)
};

__global__ void __launch_bounds__(kMixThreads, 2)
    logit_mix_kernel(const __grid_constant__ LogitMix a) {
  MixShared& s = *reinterpret_cast<MixShared*>(shared_memory());
  const int64_t step = block_count() / cluster_size();
  cluster_sync();  // the others have started
  for (int64_t row = block_index() / cluster_size(); row < a.mix.rows; row += step) {
    const bool valid = mix_terms(a.mix, row, s, false, a.base_scale ? 0 : -1);
    float shift = valid ? 0.0f : NAN;
    if (a.base_scale) shift += s.terms[0].max + s.terms[0].log_sum;
    const Columns mine = my_columns(a.mix.width);
    float* out = a.out + row * a.mix.width;
    for (int64_t c = mine.begin + kQuad * thread_index(); c < mine.end;
         c += kQuad * thread_count()) {
      float p[kQuad];
      mix_quad(a.mix, s, row, c, p);
#pragma unroll
      for (int i = 0; i < kQuad; ++i) p[i] += shift;
      if (c + kQuad <= mine.end && reinterpret_cast<uintptr_t>(out + c) % 16 == 0) {
        store16_once(out + c, pack<float>(p));
        continue;
      }
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        if (c + i < mine.end) out[c + i] = p[i];
    }
    cluster_sync();  // the next row reuses the shared memory
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
