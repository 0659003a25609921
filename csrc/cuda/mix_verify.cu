// mix_verify: the acceptance tests of all places, then one draw per request. Derivation:
// mdkernels/ops/mix_verify/README.md.
#include "mix_race.cuh"

namespace mdk {
namespace {

struct MixVerify {
  MixArgs mix;  // the places of a request are consecutive rows
  int64_t requests;
  int places;   // of a request: the most that it can have drafted, and one
  int draft;    // the model that the tokens were drawn from, at its scale
  float scale;  // 1 / temperature
  MixFilter filter;
  const int64_t* draft_ids;      // (requests, places - 1)
  const int64_t* draft_lengths;  // (requests)
  const int64_t* seeds;          // (requests)
  const int64_t* offsets;        // (requests), of the first place
  int* accepted;                 // (requests, places - 1), between the two kernels
  int64_t* num_accepted;         // (requests)
  int64_t* tokens;               // (requests, places)
  float* scratch;                // (rows of a launch, scratch_stride) scores, or null
  int64_t scratch_stride;        // a multiple of 4
};

struct Shared {
  MixShared mix;
  FilterShared filter;
  unsigned long long mass_warps[kMixWarps], mass_ranks[kMostBlocks];
};
constexpr int kHeader = (sizeof(Shared) + 15) / 16 * 16;
static_assert(kHeader <= 16 * 1024, "HEADER of mix_sample/cuda_kernels.py");

// The processed target: log v = (score - max) scale - log_mass of the tokens that are kept.
struct Target {
  MixCutoff cutoff;
  float max, scale, log_mass;

  __device__ __forceinline__ float logprob(float score, int column) const {
    return kept(cutoff, score, column) ? fmaf(score - max, scale, -log_mass) : -INFINITY;
  }
};

// The mass of what is kept, alike in all threads of the cluster; once per row. Integers, as in the
// search for the cutoff: no order of summation shows.
__device__ __forceinline__ float log_kept_mass(const Scores& scores, const MixCutoff& cutoff,
                                               Shared& s) {
  unsigned long long sum = 0;
  scores.each_quad([&](const float* x, int column) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i)
      if (kept(cutoff, x[i], column + i)) sum += scores.mass(x[i]);
  });
  sum = warp_add(sum);
  if (lane_index() == 0) s.mass_warps[warp_index()] = sum;
  block_sync();
  if (thread_index() < cluster_size()) {
    unsigned long long block = 0;
    for (int w = 0; w < warp_count(); ++w) block += s.mass_warps[w];
    *cluster_shared(&s.mass_ranks[cluster_rank()], thread_index()) = block;
  }
  cluster_sync();
  unsigned long long all = 0;
  for (int r = 0; r < cluster_size(); ++r) all += s.mass_ranks[r];
  return static_cast<float>(log(static_cast<double>(all) * 0x1p-40));
}

__device__ __forceinline__ Scores row_scores(const MixVerify& a, int64_t slot) {
  Scores scores;
  scores.columns = my_columns<kScores>(static_cast<int>(a.mix.width));
  scores.scale = a.scale;
  scores.at = a.scratch == nullptr ? reinterpret_cast<float*>(shared_memory() + kHeader)
                                   : a.scratch + slot * a.scratch_stride + scores.columns.begin;
  return scores;
}

template <bool kProcessed>
__device__ __forceinline__ Target target_of(const MixVerify& a, const Scores& scores, Shared& s) {
  Target target = {{-INFINITY, static_cast<int>(a.mix.width)}, 0.0f, 1.0f, 0.0f};
  if (!kProcessed) return target;
  target.cutoff = mix_cutoff(a.filter, scores, a.mix.width, s.filter);
  target.max = scores.max;
  target.scale = a.scale;
  target.log_mass = log_kept_mass(scores, target.cutoff, s);
  return target;
}

// What mix_columns makes of a single model of weight 1: equal to log v there, bit by bit.
__device__ __forceinline__ float draft_logprob(const MixTerm& t, float x) {
  return fmaf(x - t.max, t.scale, -t.log_sum);
}

template <bool kProcessed>
__global__ void __launch_bounds__(kMixThreads, kProcessed ? 1 : 2)
    mix_accept_kernel(const __grid_constant__ MixVerify a) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t step = block_count() / cluster_size(), drafted = a.places - 1;
  const int64_t tests = a.requests * drafted;
  cluster_sync();  // the others have started
  for (int64_t slot = block_index() / cluster_size(); slot < tests; slot += step) {
    const int64_t request = slot / drafted, place = slot - request * drafted;
    if (place >= a.draft_lengths[request]) continue;
    const int64_t row = request * a.places + place;
    const bool valid = mix_terms(a.mix, row, s.mix, false, a.draft);
    const bool writes = cluster_rank() == 0 && thread_index() == 0;
    const int64_t token = a.draft_ids[slot];
    if (!valid || token < 0 || token >= a.mix.width) {
      if (writes) a.accepted[slot] = 0;
      if (slot + step < tests) cluster_sync();
      continue;
    }
    Scores scores = row_scores(a, slot);
    if (kProcessed) {
      scores.max = -cluster_best(write_scores(a.mix, s.mix, scores), s.mix, 0).key;
    }
    const Target target = target_of<kProcessed>(a, scores, s);
    if (writes) {
      const int column = static_cast<int>(token);
      const MixTerm& draft = s.mix.terms[a.draft];
      float p, x;
      mix_columns<1>(a.mix, s.mix, column, &p);
      load_columns<1>(a.mix.models[a.draft], draft, column, &x);
      const float log_target = target.logprob(p, column);
      const float log_draft = draft_logprob(draft, x);
      const auto seed = static_cast<uint64_t>(a.seeds[request]);
      const uint64_t offset =
          static_cast<uint64_t>(a.offsets[request]) + static_cast<uint64_t>(place);
      const PhiloxWords high = philox(seed, offset, kAcceptStream, 0);
      const PhiloxWords low = philox(seed, offset, kAcceptStream + 1, 0);
      // E >= log q' - log v with E ~ Exp(1) has the probability min(1, v / q'); NaN: a rejection.
      a.accepted[slot] = race_exponential(high.word[0], low.word[0]) >=
                         static_cast<double>(log_draft) - static_cast<double>(log_target);
    }
    if (slot + step < tests) cluster_sync();  // the next row reuses the shared memory
  }
}

// Scores become (v - q')+; the largest of them, as minus it.
__device__ __forceinline__ Best<float> write_residual(const MixVerify& a, const Shared& s,
                                                      const Scores& scores, const Target& target) {
  Best<float> best = {INFINITY, -1};
  const MixTerm term = s.mix.terms[a.draft];
  scores.each_quad([&](const float* score, int c) {
    float x[kQuad], r[kQuad];
    load_columns<kQuad>(a.mix.models[a.draft], term, c, x);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const int column = c + i;
      const float v = exp2_fast(target.logprob(score[i], column) * kLog2E);
      r[i] = fmaxf(v - exp2_fast(draft_logprob(term, x[i]) * kLog2E), 0.0f);
      if (-r[i] < best.key) best = {-r[i], column};
    }
    store16(scores.at + (c - scores.columns.begin), pack<float>(r));
  });
  return best;
}

// The token of one place; alike in all threads of the cluster.
template <bool kProcessed>
__device__ __forceinline__ int draw(const MixVerify& a, Shared& s, Scores scores, bool rejected,
                                    uint64_t seed, uint64_t offset) {
  Best<float> top = cluster_best(write_scores(a.mix, s.mix, scores), s.mix, 0);
  scores.max = -top.key;
  MixCutoff cutoff = {-INFINITY, static_cast<int>(a.mix.width)};
  float inverse = 0.0f;  // 0: the race is over the target, not over the residual
  if (rejected) {
    const Target target = target_of<kProcessed>(a, scores, s);
    cutoff = target.cutoff;
    const Best<float> most = cluster_best(write_residual(a, s, scores, target), s.mix, 1);
    if (-most.key >= 0x1p-126f) {
      inverse = 1.0f / -most.key;
      top.id = most.id;
    } else {  // lost to rounding: the target itself is as good
      write_scores(a.mix, s.mix, scores);
    }
  } else if (kProcessed) {
    cutoff = mix_cutoff(a.filter, scores, a.mix.width, s.filter);
  }
  const auto rate = [&](float score, int column) {
    if (inverse > 0.0f) return score * inverse;
    return !kProcessed || kept(cutoff, score, column) ? scores.share(score) : 0.0f;
  };
  const unsigned stream = rejected ? kResidualStream : kTokenStream;
  const Best<double> mine = race(scores, rate, seed, offset, stream, top.id);
  return cluster_best(mine, s.mix, rejected ? 0 : 1).id;
}

template <bool kProcessed>
__global__ void __launch_bounds__(kMixThreads, kProcessed ? 1 : 2)
    mix_emit_kernel(const __grid_constant__ MixVerify a) {
  Shared& s = *reinterpret_cast<Shared*>(shared_memory());
  const int64_t step = block_count() / cluster_size(), drafted = a.places - 1;
  cluster_sync();  // the others have started
  for (int64_t request = block_index() / cluster_size(); request < a.requests; request += step) {
    int64_t length = a.draft_lengths[request];
    length = length < 0 ? 0 : length < drafted ? length : drafted;
    int64_t place = 0;
    while (place < length && a.accepted[request * drafted + place] != 0) ++place;
    const bool rejected = place < length;
    const int64_t row = request * a.places + place;
    bool valid = mix_terms(a.mix, row, s.mix, false, a.draft);
    const float log_sum = s.mix.terms[a.draft].log_sum;
    valid = valid && (!rejected || log_sum == log_sum);
    int64_t token = -1;
    if (valid) {
      const auto seed = static_cast<uint64_t>(a.seeds[request]);
      const uint64_t offset =
          static_cast<uint64_t>(a.offsets[request]) + static_cast<uint64_t>(place);
      token = draw<kProcessed>(a, s, row_scores(a, request), rejected, seed, offset);
    }
    if (cluster_rank() == 0) {
      for (int64_t i = thread_index(); i < a.places; i += thread_count())
        a.tokens[request * a.places + i] = i < place    ? a.draft_ids[request * drafted + i]
                                           : i == place ? token
                                                        : -1;
      if (thread_index() == 0) a.num_accepted[request] = place;
    }
    if (request + step < a.requests) cluster_sync();  // the next row reuses the shared memory
  }
}

template <bool kProcessed>
void launch_both(const MixVerify& a, Grid grid) {
  const int64_t most = kMostGridBlocks / grid.cluster, tests = a.requests * (a.places - 1);
  size_t scores = 0;
  if (a.scratch == nullptr)
    scores =
        sizeof(float) * columns_per_block<kScores>(static_cast<int>(a.mix.width), grid.cluster);
  if (tests > 0) {
    grid.blocks = (tests < most ? tests : most) * grid.cluster;
    grid.shared_bytes = kHeader + (kProcessed ? scores : 0);
    launch<mix_accept_kernel<kProcessed>>(grid, a);
  }
  grid.blocks = (a.requests < most ? a.requests : most) * grid.cluster;
  grid.shared_bytes = kHeader + scores;
  launch<mix_emit_kernel<kProcessed>>(grid, a);
}

}  // namespace

void mix_verify(Arguments& in) {
  MixVerify a;
  a.mix = MixArgs::read(in);
  a.requests = in.integer();
  a.places = static_cast<int>(in.integer());
  a.draft = static_cast<int>(in.integer());
  a.scale = static_cast<float>(in.real());
  a.filter.top_k = in.integer();
  a.filter.top_p = in.real();
  a.filter.min_p = static_cast<float>(in.real());
  a.draft_ids = in.pointer<const int64_t>();
  a.draft_lengths = in.pointer<const int64_t>();
  a.seeds = in.pointer<const int64_t>();
  a.offsets = in.pointer<const int64_t>();
  a.accepted = in.pointer<int>();
  a.num_accepted = in.pointer<int64_t>();
  a.tokens = in.pointer<int64_t>();
  a.scratch = in.pointer<float>();
  a.scratch_stride = in.integer();
  const Grid grid = mix_grid(in, a.mix, kHeader);
  in.done();
  if (a.requests == 0) return;
  const bool filtered = a.filter.top_k > 0 || a.filter.top_p < 1.0 || a.filter.min_p > -INFINITY;
  if (filtered || a.scale != 1.0f)
    launch_both<true>(a, grid);
  else
    launch_both<false>(a, grid);
}

}  // namespace mdk
