// Top-k, top-p and min-p as one cutoff: each of them keeps a prefix of the tokens sorted by (score
// descending, id ascending), so their chain is the last token that is kept. It is found without
// sorting, by counting: eight thresholds a pass. Derivation: mdkernels/ops/mix_sample/README.md.
#pragma once
#include "mix_columns.cuh"

namespace mdk {

struct MixFilter {
  int64_t top_k;  // 0: off
  double top_p;   // 1: off
  float min_p;    // its logarithm in nats; -inf: off
};

// Kept: score > cutoff, or score == cutoff and id <= last_tie.
struct MixCutoff {
  float score;
  int last_tie;
};

constexpr int kBounds = 8;  // thresholds that are measured at a time
constexpr int kScores = 8;  // columns that a thread mixes together

struct FilterShared {
  unsigned long long warps[kMixWarps][kBounds];
  unsigned long long ranks[2][kMostBlocks][kBounds];
};

// This block's share of the scores of a row.
struct Scores {
  float* at;  // of columns.begin; 16-byte aligned, whole quads, padded with -inf
  Columns columns;
  float max, scale;  // a token's probability is proportional to exp((score - max) scale)

  // Calls body(column of the first of kScores). Each thread meets the same columns every time.
  template <class F>
  __device__ __forceinline__ void each_group(const F& body) const {
    for (int c = columns.begin + kScores * thread_index(); c < columns.end;
         c += kScores * thread_count())
      body(c);
  }
  // Calls body(four scores, column of the first).
  template <class F>
  __device__ __forceinline__ void each_quad(const F& body) const {
    each_group([&](int group) {
#pragma unroll 1
      for (int c = group; c < group + kScores && c < columns.end; c += kQuad) {
        float s[kQuad];
        unpack<float>(load16(at + (c - columns.begin)), s);
        body(s, c);
      }
    });
  }
  // Of one group; its last quads can be behind the end.
  __device__ __forceinline__ void store(int group, const float* s) const {
#pragma unroll
    for (int i = 0; i < kScores; i += kQuad)
      if (group + i < columns.end) store16(at + (group + i - columns.begin), pack<float>(s + i));
  }
  __device__ __forceinline__ float share(float score) const {
    return exp2_fast((score - max) * (scale * kLog2E));
  }
  // In units of 2^-40 of the best token's: sums are exact, so they do not depend on an order and
  // never decrease with the threshold.
  __device__ __forceinline__ unsigned long long mass(float score) const {
    return static_cast<unsigned long long>(share(score) * 0x1p40f);
  }
};

// Floats in the order of unsigned numbers; not for NaN.
__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = float_to_bits(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(unsigned u) {
  return bits_to_float(u & 0x80000000u ? u & 0x7fffffffu : ~u);
}

// What is counted, at which tokens' thresholds: tokens by score, probability by score, or tokens of
// one score by id.
enum class Measure { kCount, kMass, kTies };

// sums[t], alike in all threads of the cluster: the weight of the tokens with key >= bounds[t].
// Bounds ascend. `slot` alternates from call to call.
__device__ __forceinline__ void measure(const Scores& scores, FilterShared& f, int slot,
                                        Measure what, float tie, const unsigned* bounds,
                                        unsigned long long* sums) {
#pragma unroll
  for (int t = 0; t < kBounds; ++t) sums[t] = 0;
  scores.each_quad([&](const float* s, int column) {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      const unsigned id = static_cast<unsigned>(column + i) + 1u;
      const unsigned key = what != Measure::kTies ? ordered(s[i]) : s[i] == tie ? id : 0u;
      if (key < bounds[0]) continue;
      const unsigned long long weight = what == Measure::kMass ? scores.mass(s[i]) : 1ull;
#pragma unroll
      for (int t = 0; t < kBounds; ++t) sums[t] += key >= bounds[t] ? weight : 0;
    }
  });
#pragma unroll
  for (int t = 0; t < kBounds; ++t) {
    sums[t] = warp_add(sums[t]);
    if (lane_index() == 0) f.warps[warp_index()][t] = sums[t];
  }
  block_sync();
  if (thread_index() < kBounds) {
    unsigned long long sum = 0;
    for (int w = 0; w < warp_count(); ++w) sum += f.warps[w][thread_index()];
    for (int r = 0; r < cluster_size(); ++r)
      *cluster_shared(&f.ranks[slot][cluster_rank()][thread_index()], r) = sum;
  }
  cluster_sync();
#pragma unroll
  for (int t = 0; t < kBounds; ++t) {
    sums[t] = 0;
    for (int r = 0; r < cluster_size(); ++r) sums[t] += f.ranks[slot][r][t];
  }
}

struct Found {
  unsigned key;
  unsigned long long above, reached, target;  // weight of keys > key, of keys >= key
};

// The largest key with weight(keys >= key) >= target. All of the weight that counts lies in
// [bounds[0], high); the bounds are the first thresholds. The target is `fraction` of all, or, if
// that is negative, `count`.
__device__ __forceinline__ Found search(const Scores& scores, FilterShared& f, int* slot,
                                        Measure what, float tie, unsigned* bounds, unsigned high,
                                        double fraction, unsigned long long count) {
  Found found = {bounds[0], 0, 0, count};
#pragma unroll 1
  for (bool first = true;; first = false) {
    unsigned long long sums[kBounds];
    measure(scores, f, *slot, what, tie, bounds, sums);
    *slot ^= 1;
    if (first && fraction >= 0.0) {
      const double target = ceil(fraction * static_cast<double>(sums[0]));
      found.target = target < 1.0 ? 1 : static_cast<unsigned long long>(target);
      if (found.target > sums[0]) found.target = sums[0];
    }
    found.key = bounds[0];
    found.reached = sums[0];
    bool above = true;  // the bound is above the key that is looked for
#pragma unroll
    for (int t = kBounds - 1; t > 0; --t) {
      if (!above) continue;
      if (sums[t] >= found.target && bounds[t] > bounds[0]) {
        found.key = bounds[t];
        found.reached = sums[t];
        above = false;
      } else if (bounds[t] > bounds[0]) {
        high = bounds[t];
        found.above = sums[t];
      }
    }
    if (high - found.key <= 1) return found;
#pragma unroll
    for (int t = 0; t < kBounds; ++t)
      bounds[t] =
          found.key + static_cast<unsigned>(static_cast<uint64_t>(high - found.key) * t / kBounds);
  }
}

// Alike in all threads of the cluster. No barrier is needed since the scores were written: every
// thread reads what it wrote.
__device__ __forceinline__ MixCutoff mix_cutoff(const MixFilter& filter, const Scores& scores,
                                                int64_t width, FilterShared& f) {
  MixCutoff cutoff = {-INFINITY, static_cast<int>(width)};
  int slot = 0;
  unsigned low = 0;
  unsigned long long rank = 0;  // of the last kept tie, counted from the largest id; 0: all stay
#pragma unroll 1
  for (int stage = 0; stage < 3; ++stage) {
    const auto what = static_cast<Measure>(stage);
    if (what == Measure::kCount && !(filter.top_k > 0 && filter.top_k < width)) continue;
    if (what == Measure::kMass && !(filter.top_p < 1.0)) continue;
    if (what == Measure::kTies && rank == 0) continue;
    // The first thresholds of a score: nats below the maximum, before the temperature.
    constexpr float kBelow[kBounds] = {0.0f, 17.0f, 12.0f, 8.5f, 6.0f, 4.0f, 2.5f, 1.0f};
    unsigned bounds[kBounds];
    unsigned high = ordered(scores.max) + 1;
    if (what == Measure::kTies) {
      low = 1;
      high = static_cast<unsigned>(width) + 1;
    }
    bounds[0] = low;
#pragma unroll
    for (int t = 1; t < kBounds; ++t) {
      const unsigned bound =
          what == Measure::kTies
              ? low + static_cast<unsigned>(static_cast<uint64_t>(high - low) * t / kBounds)
              : ordered(scores.max - kBelow[t] / scores.scale);
      bounds[t] = bound > low ? bound : low;
    }
    const Found found = search(scores, f, &slot, what, cutoff.score, bounds, high,
                               what == Measure::kMass ? filter.top_p : -1.0,
                               what == Measure::kCount ? filter.top_k : rank);
    if (what == Measure::kTies) {
      cutoff.last_tie = static_cast<int>(found.key) - 1;
      continue;
    }
    low = found.key;
    cutoff.score = from_ordered(found.key);
    if (what == Measure::kCount) continue;
    // Equal tokens are ranked by id: the first `keep` of them stay.
    const unsigned long long each = scores.mass(cutoff.score);
    const unsigned long long ties = (found.reached - found.above) / each;
    const unsigned long long keep = (found.target - found.above + each - 1) / each;
    rank = keep < ties ? ties - keep + 1 : 0;
  }
  const float bound = scores.max + filter.min_p / scores.scale;
  if (bound > cutoff.score) cutoff = {bound, static_cast<int>(width)};
  return cutoff;
}

}  // namespace mdk
