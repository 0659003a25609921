// Draws one model per row according to the weights: the short way of mix_sample, see "component" in
// mdkernels/ops/mix_sample/README.md.
#include "mix.cuh"
#include "philox.cuh"

namespace mdk {
namespace {

struct MixChoose {
  MixArgs mix;
  const int64_t* seeds;
  const int64_t* offsets;
  float* chosen;  // (rows, count - 1): 1 in the column of a memory, nothing but 0 for the base
};

constexpr int kThreads = 128;
constexpr unsigned kStream = 2;  // of the high words; the low ones are next to it

__global__ void __launch_bounds__(kThreads) mix_choose_kernel(const __grid_constant__ MixChoose a) {
  const int64_t step = block_count() * thread_count();
  for (int64_t row = block_index() * thread_count() + thread_index(); row < a.mix.rows;
       row += step) {
    const auto seed = static_cast<uint64_t>(a.seeds[row]);
    const auto offset = static_cast<uint64_t>(a.offsets[row]);
    bool valid = true;
    double best = static_cast<double>(INFINITY);
    int chosen = 0;
    for (int first = 0; first < a.mix.count; first += 4) {
      const PhiloxWords high = philox(seed, offset, kStream, static_cast<unsigned>(first) / 4);
      const PhiloxWords low = philox(seed, offset, kStream + 1, static_cast<unsigned>(first) / 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i >= a.mix.count) continue;
        bool good;
        const float weight = mix_weight(a.mix, row, first + i, &good);
        valid = valid && good;
        const double key =
            race_exponential(high.word[i], low.word[i]) / static_cast<double>(weight);
        if (!(key < best)) continue;
        best = key;
        chosen = first + i;
      }
    }
    float* out = a.chosen + row * (a.mix.count - 1);
    for (int k = 1; k < a.mix.count; ++k) out[k - 1] = !valid ? NAN : k == chosen ? 1.0f : 0.0f;
  }
}

}  // namespace

void mix_choose(Arguments& in) {
  MixChoose a;
  a.mix = MixArgs::read(in);
  a.seeds = in.pointer<const int64_t>();
  a.offsets = in.pointer<const int64_t>();
  a.chosen = in.pointer<float>();
  in.done();
  if (a.mix.rows == 0) return;
  Grid grid;
  grid.threads = kThreads;
  const int64_t blocks = (a.mix.rows + kThreads - 1) / kThreads;
  grid.blocks = blocks < kMostGridBlocks ? blocks : kMostGridBlocks;
  grid.stream = in.stream;
  launch<mix_choose_kernel>(grid, a);
}

}  // namespace mdk
