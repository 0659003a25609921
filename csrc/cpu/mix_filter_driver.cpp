#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "isa.h"
#include "mix_filter.h"

namespace mdk {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kSortAtMost = 1024;  // tokens; above it another pass narrows the range

struct Ranking {  // descending score, ascending id
  const float* scores;
  bool operator()(int32_t a, int32_t b) const {
    return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
  }
};

void collect(const float* scores, int64_t width, float bound, std::vector<int32_t>& ids) {
  ids.resize(width);
  ids.resize(kernels().mix.collect(scores, width, bound, ids.data(), width));
}

// The k-th largest score; `ids` becomes the tokens that reach it.
float keep_top_k(int64_t k, const float* scores, const float* group_maxima, int64_t width,
                 std::vector<int32_t>& ids) {
  const int64_t groups = (width + kMixGroup - 1) / kMixGroup;
  float bound = -kInfinity;  // at least k scores reach the k-th largest group maximum
  if (k <= groups) {
    std::vector<float> maxima(group_maxima, group_maxima + groups);
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<>());
    bound = maxima[k - 1];
  }
  collect(scores, width, bound, ids);
  std::nth_element(ids.begin(), ids.begin() + (k - 1), ids.end(), Ranking{scores});
  const float kth = scores[ids[k - 1]];
  ids.erase(std::remove_if(ids.begin(), ids.end(), [=](int32_t i) { return scores[i] < kth; }),
            ids.end());
  return kth;
}

// The scores in [low, high) are where the cumulative mass crosses the target.
struct Bracket {
  float high, low;
  double mass_above_high, target;
};

Bracket find_bracket(double top_p, const float* scores, int64_t width, float max, float scale) {
  constexpr int kBounds = 8;
  // In units of the temperature below the maximum. The last one gives the total.
  const float steps[kBounds] = {0.25f, 1.0f, 2.0f, 3.5f, 5.5f, 8.0f, 12.0f, kInfinity};
  float bounds[kBounds];
  double mass[kBounds];
  int64_t tokens[kBounds];
  for (int i = 0; i < kBounds; ++i) bounds[i] = max - steps[i] / scale;
  kernels().mix.mass_above(scores, width, max, scale, bounds, kBounds, mass, tokens);
  Bracket found = {kInfinity, -kInfinity, 0.0, top_p * mass[kBounds - 1]};
  int64_t above_high = 0, above_low = tokens[kBounds - 1];
  for (int round = 0;; ++round) {
    for (int i = 0; i < kBounds; ++i) {
      if (mass[i] >= found.target) {
        found.low = bounds[i];
        above_low = tokens[i];
        break;
      }
      found.high = bounds[i];
      found.mass_above_high = mass[i];
      above_high = tokens[i];
    }
    constexpr int kRounds = 5;  // ties cannot be narrowed down
    if (above_low - above_high <= kSortAtMost || round == kRounds) return found;
    const float from = found.high < kInfinity ? found.high : max;
    const float to = found.low > -kInfinity ? found.low : from - 90.0f / scale;
    for (int i = 0; i < kBounds; ++i)
      bounds[i] = i + 1 < kBounds ? from + (to - from) * (i + 1) / kBounds : found.low;
    kernels().mix.mass_above(scores, width, max, scale, bounds, kBounds, mass, tokens);
  }
}

// The last token of the shortest prefix of `ids`, in rank order, whose mass reaches the target.
MixCutoff cut_mass(const float* scores, float max, float scale, double mass, double target,
                   std::vector<int32_t>& ids) {
  std::sort(ids.begin(), ids.end(), Ranking{scores});
  MixCutoff cutoff = {scores[ids[0]], ids[0]};
  for (const int32_t id : ids) {
    if (mass >= target && mass > 0.0) break;
    cutoff = {scores[id], id};
    mass += std::exp(static_cast<double>((scores[id] - max) * scale));
  }
  return cutoff;
}

}  // namespace

MixCutoff mix_cutoff(const MixFilter& filter, const float* scores, const float* group_maxima,
                     int64_t width, float max, float scale, std::vector<int32_t>& ids) {
  MixCutoff cutoff = {-kInfinity, width};
  const bool by_count = filter.top_k > 0 && filter.top_k < width;
  if (by_count) cutoff.score = keep_top_k(filter.top_k, scores, group_maxima, width, ids);
  if (filter.top_p < 1.0) {
    if (by_count) {
      double total = 0.0;
      for (const int32_t id : ids)
        total += std::exp(static_cast<double>((scores[id] - max) * scale));
      cutoff = cut_mass(scores, max, scale, 0.0, filter.top_p * total, ids);
    } else {
      const Bracket b = find_bracket(filter.top_p, scores, width, max, scale);
      collect(scores, width, b.low, ids);
      const auto above = [&](int32_t i) { return scores[i] >= b.high; };
      ids.erase(std::remove_if(ids.begin(), ids.end(), above), ids.end());
      cutoff = cut_mass(scores, max, scale, b.mass_above_high, b.target, ids);
    }
  }
  if (filter.min_p > 0.0) {
    const float bound = max + static_cast<float>(std::log(filter.min_p)) / scale;
    if (bound > cutoff.score) cutoff = {bound, width};
  }
  return cutoff;
}

}  // namespace mdk
