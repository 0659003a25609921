// mix_sample: mixture, filters and draw in one launch, and the log-probabilities of drawn tokens.
// Derivation: mdkernels/ops/mix_sample/README.md.
#include "mix_filter.cuh"
#include "philox.cuh"

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

// Scores of this block's columns into memory, and the best of them as minus the score.
__device__ __forceinline__ Best<float> write_scores(const MixArgs& a, const MixShared& s,
                                                    int64_t row, const Scores& scores) {
  Best<float> best = {INFINITY, -1};
  const Columns mine = scores.columns;
  for (int64_t c = mine.begin + kQuad * thread_index(); c < mine.end; c += kQuad * thread_count()) {
    float p[kQuad];
    mix_quad(a, s, row, c, p);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (c + i >= a.width) p[i] = -INFINITY;
      if (-p[i] < best.key) best = {-p[i], static_cast<int>(c) + i};
    }
    store16(scores.at + (c - mine.begin), pack<float>(p));
  }
  return best;
}

// The smallest E_j / q_j over this thread's kept tokens. E >= v, so a token whose v already exceeds
// the best key times q cannot win: few need the low word and the logarithm.
__device__ __forceinline__ Best<double> race(const Scores& scores, const MixCutoff& cutoff,
                                             uint64_t seed, uint64_t offset, int top) {
  // The best token has q = 1 and E <= v / (1 - v): nobody slower than that wins.
  const PhiloxWords words = philox(seed, offset, 0, static_cast<unsigned>(top) / 4);
  const int lane = top % 4;  // the array must stay in registers
  const unsigned high = lane == 0   ? words.word[0]
                        : lane == 1 ? words.word[1]
                        : lane == 2 ? words.word[2]
                                    : words.word[3];
  const float v = (static_cast<float>(high >> 8) + 1.0f) * 0x1p-24f;
  constexpr float kMargin = 1.0001f;  // the rounding of q and of the products
  float limit = v / (1.0f - v) * (0x1p24f * kMargin);
  Best<double> best = {static_cast<double>(INFINITY), -1};
  scores.each_quad([&](const float* s, int column) {
    float q[kQuad];
    bool any = false;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const bool kept =
          s[i] > cutoff.score || (s[i] == cutoff.score && column + i <= cutoff.last_tie);
      q[i] = kept ? scores.share(s[i]) : 0.0f;
      any = any || q[i] > 0.0f;
    }
    if (!any) return;
    const PhiloxWords fast = philox(seed, offset, 0, static_cast<unsigned>(column) / 4);
    bool pass[kQuad], some = false;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      pass[i] = q[i] > 0.0f && static_cast<float>(fast.word[i] >> 8) <= limit * q[i];
      some = some || pass[i];
    }
    if (!some) return;
    const PhiloxWords low = philox(seed, offset, 1, static_cast<unsigned>(column) / 4);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (!pass[i]) continue;
      const double key = race_exponential(fast.word[i], low.word[i]) / static_cast<double>(q[i]);
      best = better(best, Best<double>{key, column + i});
    }
    limit = fminf(limit, static_cast<float>(best.key) * (0x1p24f * kMargin));
  });
  return best;
}

template <bool kFilter>
__global__ void __launch_bounds__(kMixThreads, kFilter ? 1 : 2)
    mix_sample_kernel(const __grid_constant__ MixSample a) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t step = block_count() / cluster_size();
  Scores scores;
  scores.columns = my_columns(a.mix.width);
  scores.scale = a.scale;
  cluster_sync();  // the others have started
  for (int64_t row = block_index() / cluster_size(); row < a.mix.rows; row += step) {
    const bool writes = cluster_rank() == 0 && thread_index() == 0;
    if (!mix_terms(a.mix, row, s.mix, false, false)) {
      if (writes) a.tokens[row] = -1;
      cluster_sync();
      continue;
    }
    scores.at = a.scratch == nullptr ? reinterpret_cast<float*>(shared_memory() + kHeader)
                                     : a.scratch + row * a.scratch_stride + scores.columns.begin;
    const Best<float> top = cluster_best(write_scores(a.mix, s.mix, row, scores), s.mix, 0);
    scores.max = -top.key;
    MixCutoff cutoff = {-INFINITY, static_cast<int>(a.mix.width)};
    if (kFilter) cutoff = mix_cutoff(a.filter, scores, a.mix.width, s.filter);
    const auto seed = static_cast<uint64_t>(a.seeds[row]);
    const auto offset = static_cast<uint64_t>(a.offsets[row]);
    const Best<double> best = cluster_best(race(scores, cutoff, seed, offset, top.id), s.mix, 1);
    if (writes) a.tokens[row] = best.id;
    cluster_sync();  // the next row reuses the shared memory
  }
}

struct MixLogprobs {
  MixArgs mix;
  const int64_t* tokens;
  float* out;  // (rows, 1 + models): under the mixture, under each model
};

__global__ void __launch_bounds__(kMixThreads, 2)
    mix_logprobs_kernel(const __grid_constant__ MixLogprobs a) {
  MixShared& s = *reinterpret_cast<MixShared*>(shared_memory());
  const int64_t step = block_count() / cluster_size();
  cluster_sync();  // the others have started
  for (int64_t row = block_index() / cluster_size(); row < a.mix.rows; row += step) {
    const bool valid = mix_terms(a.mix, row, s, true, true);
    const int64_t token = a.tokens[row];
    const bool known = token >= 0 && token < a.mix.width;
    float* out = a.out + row * (1 + a.mix.count);
    if (cluster_rank() == 0) {
      for (int k = thread_index(); k < a.mix.count; k += thread_count()) {
        const MixTerm& t = s.terms[k];
        float x[kQuad];
        if (known) load_quad(a.mix.models[k], row, token, x);
        out[1 + k] = known ? fmaf(x[0] - t.max, t.scale, -t.log_sum) : NAN;
      }
      if (thread_index() == 0) {
        float p[kQuad];
        if (known) mix_quad(a.mix, s, row, token, p);
        out[0] = known && valid ? p[0] : NAN;
      }
    }
    cluster_sync();  // the next row reuses the shared memory
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
    grid.shared_bytes += sizeof(float) * columns_per_block(a.mix.width, grid.cluster);
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
  const Grid grid = mix_grid(in, a.mix, sizeof(MixShared));
  in.done();
  if (a.mix.rows > 0) launch<mix_logprobs_kernel>(grid, a);
}

}  // namespace mdk
