// mix_sample: mixture, filters and draw in one launch, and the log-probabilities of drawn tokens.
// Derivation: mdkernels/ops/mix_sample/README.md.
#include "mix_race.cuh"

namespace mdk {
namespace {

struct MixSample {
  MixArgs mix;
  float scale;  // 1 / temperature
  MixFilter filter;
  const int64_t* seeds;
  const int64_t* offsets;
  int64_t* tokens;         // (rows)
  float* scratch;          // (rows, scratch_stride) scores, or null: they fit in shared memory
  int64_t scratch_stride;  // a multiple of 4
};

struct Shared {
  MixShared mix;
  FilterShared filter;
};
constexpr int kHeader = (sizeof(Shared) + 15) / 16 * 16;
static_assert(kHeader <= 16 * 1024, "HEADER of mix_sample/cuda_kernels.py");

template <bool kFilter>
__global__ void __launch_bounds__(kMixThreads, kFilter ? 1 : 2)
    mix_sample_kernel(const __grid_constant__ MixSample a) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t step = block_count() / cluster_size();
  Scores scores;
  scores.columns = my_columns<kScores>(static_cast<int>(a.mix.width));
  scores.scale = a.scale;
  cluster_sync();  // the others have started
  for (int64_t row = block_index() / cluster_size(); row < a.mix.rows; row += step) {
    const bool writes = cluster_rank() == 0 && thread_index() == 0;
    if (!mix_terms(a.mix, row, s.mix, false, -1)) {
      if (writes) a.tokens[row] = -1;
      if (row + step < a.mix.rows) cluster_sync();
      continue;
    }
    scores.at = a.scratch == nullptr ? reinterpret_cast<float*>(shared_memory() + kHeader)
                                     : a.scratch + row * a.scratch_stride + scores.columns.begin;
    const Best<float> top = cluster_best(write_scores(a.mix, s.mix, scores), s.mix, 0);
    scores.max = -top.key;
    MixCutoff cutoff = {-INFINITY, static_cast<int>(a.mix.width)};
    if (kFilter) cutoff = mix_cutoff(a.filter, scores, a.mix.width, s.filter);
    const auto seed = static_cast<uint64_t>(a.seeds[row]);
    const auto offset = static_cast<uint64_t>(a.offsets[row]);
    const auto rate = [&](float score, int column) {
      return !kFilter || kept(cutoff, score, column) ? scores.share(score) : 0.0f;
    };
    const Best<double> best =
        cluster_best(race(scores, rate, seed, offset, kTokenStream, top.id), s.mix, 1);
    if (writes) a.tokens[row] = best.id;
    if (row + step < a.mix.rows) cluster_sync();  // the next row reuses the shared memory
  }
}

struct MixLogprobs {
  MixArgs mix;
  const int64_t* tokens;
  int each;    // pieces of a row per block of its cluster
  float* out;  // (rows, 1 + models): under the mixture, under each model
};

struct LogprobsShared {
  MixShared mix;
  WarpSums warps[kMostBlocks];
};

__global__ void __launch_bounds__(kMixThreads, 3)
    mix_logprobs_kernel(const __grid_constant__ MixLogprobs a) {
  LogprobsShared& s = *reinterpret_cast<LogprobsShared*>(shared_memory());
  const int64_t step = block_count() / cluster_size();
  cluster_sync();  // the others have started
  for (int64_t row = block_index() / cluster_size(); row < a.mix.rows; row += step) {
    const bool valid = mix_terms(a.mix, row, s.mix, true, -1, s.warps, a.each);
    const int64_t token = a.tokens[row];
    const bool known = token >= 0 && token < a.mix.width;
    float* out = a.out + row * (1 + a.mix.count);
    if (cluster_rank() == 0) {
      for (int k = thread_index(); k < a.mix.count; k += thread_count()) {
        const MixTerm& t = s.mix.terms[k];
        float x;
        if (known) load_columns<1>(a.mix.models[k], t, static_cast<int>(token), &x);
        out[1 + k] = known ? fmaf(x - t.max, t.scale, -t.log_sum) : NAN;
      }
      if (thread_index() == 0) {
        float p;
        if (known) mix_columns<1>(a.mix, s.mix, static_cast<int>(token), &p);
        out[0] = known && valid ? p : NAN;
      }
    }
    if (row + step < a.mix.rows) cluster_sync();  // the next row reuses the shared memory
  }
}

}  // namespace

void mix_sample(Arguments& in) {
  MixSample a;
  a.mix = MixArgs::read(in);
  a.scale = static_cast<float>(in.real());
  a.filter.top_k = in.integer();
  a.filter.top_p = in.real();
  a.filter.min_p = static_cast<float>(in.real());
  a.seeds = in.pointer<const int64_t>();
  a.offsets = in.pointer<const int64_t>();
  a.tokens = in.pointer<int64_t>();
  a.scratch = in.pointer<float>();
  a.scratch_stride = in.integer();
  Grid grid = mix_grid(in, a.mix, kHeader);
  in.done();
  if (a.mix.rows == 0) return;
  if (a.scratch == nullptr)
    grid.shared_bytes +=
        sizeof(float) * columns_per_block<kScores>(static_cast<int>(a.mix.width), grid.cluster);
  if (a.filter.top_k > 0 || a.filter.top_p < 1.0 || a.filter.min_p > -INFINITY)
    launch<mix_sample_kernel<true>>(grid, a);
  else
    launch<mix_sample_kernel<false>>(grid, a);
}

void mix_logprobs(Arguments& in) {
  MixLogprobs a;
  a.mix = MixArgs::read(in);
  a.tokens = in.pointer<const int64_t>();
  a.out = in.pointer<float>();
  const Grid grid = mix_grid(in, a.mix, sizeof(LogprobsShared));
  a.each = static_cast<int>(in.integer()) / grid.cluster;
  in.done();
  if (a.mix.rows > 0) launch<mix_logprobs_kernel>(grid, a);
}

}  // namespace mdk
