#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "isa.h"
#include "mix_filter.h"

namespace mdk {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kSortAtMost = 64;  // candidates; above it another pass narrows the range

// The candidates become the tokens of low <= score < high.
void collect(const float* scores, int64_t n, float low, float high, MixCandidates& c) {
  if (static_cast<int64_t>(c.ids.size()) < n) {
    c.ids.resize(n);
    c.scores.resize(n);
  }
  c.count = kernels().mix.collect(scores, n, low, high, c.ids.data(), c.scores.data());
}

float kth_largest(std::vector<float>& values, int64_t k) {
  std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<>());
  return values[k - 1];
}

// The k-th largest score. The candidates become the tokens that reach it, and a few more.
float keep_top_k(int64_t k, const float* scores, const float* group_maxima, int64_t width,
                 MixCandidates& c) {
  const int64_t groups = (width + kMixGroup - 1) / kMixGroup;
  float bound = -kInfinity;  // at least k scores reach the k-th largest group maximum
  if (k <= groups) {
    c.work.assign(group_maxima, group_maxima + groups);
    bound = kth_largest(c.work, k);
  }
  collect(scores, width, bound, kInfinity, c);
  c.work.assign(c.scores.begin(), c.scores.begin() + c.count);
  return kth_largest(c.work, k);
}

// The last token, in rank order, of the shortest prefix of all tokens whose mass reaches `target`.
// The candidates hold that token; `mass` is what ranks before them.
MixCutoff cut_mass(float max, float scale, double mass, double target, MixCandidates& c) {
  std::vector<int32_t> order(c.count);
  std::iota(order.begin(), order.end(), 0);
  // The candidates are in the order of their ids, so a stable sort ranks equals by id.
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return c.scores[a] > c.scores[b]; });
  MixCutoff cutoff = {c.scores[order[0]], c.ids[order[0]]};
  for (const int32_t i : order) {
    if (mass >= target && mass > 0.0) break;
    cutoff = {c.scores[i], c.ids[i]};
    mass += std::exp(static_cast<double>((c.scores[i] - max) * scale));
  }
  return cutoff;
}

// The scores in [low, high) are where the cumulative mass crosses the target.
struct Bracket {
  float low, high;
  double mass_above;  // of scores >= high

  // bounds descend, mass[i] lies in [bounds[i], high). The last bound is known to reach the target
  // (rounding might deny it).
  void narrow(const float* bounds, const double* mass, double target) {
    const double before = mass_above;
    low = bounds[kMixBounds - 1];
    for (int i = 0; i + 1 < kMixBounds; ++i) {
      if (before + mass[i] >= target) {
        low = bounds[i];
        return;
      }
      high = bounds[i];
      mass_above = before + mass[i];
    }
  }
};

// Top-p over a whole row: one pass brackets the cutoff, and what is in the bracket is narrowed down
// further by itself until little enough is left to sort.
MixCutoff keep_top_p(double top_p, const float* scores, int64_t width, float max, float scale,
                     MixCandidates& c) {
  // In units of the temperature below the maximum. The last one gives the total.
  const float steps[kMixBounds] = {0.5f, 1.5f, 2.5f, 4.0f, 6.0f, 8.5f, 12.0f, kInfinity};
  float bounds[kMixBounds];
  double mass[kMixBounds];
  for (int i = 0; i < kMixBounds; ++i) bounds[i] = max - steps[i] / scale;
  kernels().mix.mass_above(scores, width, max, scale, bounds, mass);
  const double target = top_p * mass[kMixBounds - 1];
  Bracket bracket = {-kInfinity, kInfinity, 0.0};
  bracket.narrow(bounds, mass, target);
  collect(scores, width, bracket.low, bracket.high, c);

  while (c.count > kSortAtMost) {
    const auto [least, most] = std::minmax_element(c.scores.begin(), c.scores.begin() + c.count);
    const float from = *most, to = std::max(*least, from - 90.0f / scale);
    for (int i = 0; i < kMixBounds; ++i)
      bounds[i] = from + (to - from) * static_cast<float>(i + 1) / kMixBounds;
    bounds[kMixBounds - 1] = bracket.low;
    kernels().mix.mass_above(c.scores.data(), c.count, max, scale, bounds, mass);
    bracket.narrow(bounds, mass, target);
    int64_t left = 0;
    for (int64_t i = 0; i < c.count; ++i) {
      c.ids[left] = c.ids[i];
      c.scores[left] = c.scores[i];
      left += c.scores[i] >= bracket.low && c.scores[i] < bracket.high;
    }
    const bool stuck = left == c.count;  // ties, or as good as
    c.count = left;
    if (stuck) break;
  }
  return cut_mass(max, scale, bracket.mass_above, target, c);
}

}  // namespace

MixCutoff mix_cutoff(const MixFilter& filter, const float* scores, const float* group_maxima,
                     int64_t width, float max, float scale, MixCandidates& candidates) {
  MixCutoff cutoff = {-kInfinity, width};
  const bool by_count = filter.top_k > 0 && filter.top_k < width;
  if (by_count) cutoff.score = keep_top_k(filter.top_k, scores, group_maxima, width, candidates);
  if (filter.top_p < 1.0 && by_count) {
    double total = 0.0;
    for (int64_t i = 0; i < candidates.count; ++i) {
      const float score = candidates.scores[i];
      if (score >= cutoff.score) total += std::exp(static_cast<double>((score - max) * scale));
    }
    cutoff = cut_mass(max, scale, 0.0, filter.top_p * total, candidates);
  } else if (filter.top_p < 1.0) {
    cutoff = keep_top_p(filter.top_p, scores, width, max, scale, candidates);
  }
  if (filter.min_p > 0.0) {
    const float bound = max + static_cast<float>(std::log(filter.min_p)) / scale;
    if (bound > cutoff.score) cutoff = {bound, width};
  }
  return cutoff;
}

}  // namespace mdk
