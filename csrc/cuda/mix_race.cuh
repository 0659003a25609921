// The draw from a row of scores, shared by mix_sample and mix_verify. Derivation:
// mdkernels/ops/mix_sample/README.md.
#pragma once
#include "mix_filter.cuh"
#include "philox.cuh"

namespace mdk {

// Scores of this block's columns into memory, and the best of them as minus the score.
__device__ __forceinline__ Best<float> write_scores(const MixArgs& a, const MixShared& s,
                                                    const Scores& scores) {
  Best<float> best = {INFINITY, -1};
  scores.each_group([&](int c) {
    float p[kScores];
    mix_columns<kScores>(a, s, c, p);
#pragma unroll
    for (int i = 0; i < kScores; ++i)
      if (-p[i] < best.key) best = {-p[i], c + i};
    scores.store(c, p);
  });
  return best;
}

__device__ __forceinline__ bool kept(const MixCutoff& cutoff, float score, int column) {
  return score > cutoff.score || (score == cutoff.score && column <= cutoff.last_tie);
}

// Philox streams of the high words; the low ones are next to them. See mix_sample/README.md.
constexpr unsigned kTokenStream = 0, kAcceptStream = 4, kResidualStream = 6;

// The smallest E_j / q_j over this thread's tokens, q_j = rate(score, column) with its maximum of 1
// at `top`. E >= v, so a token whose v already exceeds
// the best key times q cannot win: few need the low word and the logarithm.
template <class Rate>
__device__ __forceinline__ Best<double> race(const Scores& scores, const Rate& rate, uint64_t seed,
                                             uint64_t offset, unsigned stream, int top) {
  // The best token has q = 1 and E <= v / (1 - v): nobody slower than that wins.
  const PhiloxWords words = philox(seed, offset, stream, static_cast<unsigned>(top) / 4);
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
      q[i] = rate(s[i], column + i);
      any = any || q[i] > 0.0f;
    }
    if (!any) return;
    const PhiloxWords fast = philox(seed, offset, stream, static_cast<unsigned>(column) / 4);
    bool pass[kQuad], some = false;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      pass[i] = q[i] > 0.0f && static_cast<float>(fast.word[i] >> 8) <= limit * q[i];
      some = some || pass[i];
    }
    if (!some) return;
    const PhiloxWords low = philox(seed, offset, stream + 1, static_cast<unsigned>(column) / 4);
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

}  // namespace mdk
