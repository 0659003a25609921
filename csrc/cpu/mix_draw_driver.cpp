#include <algorithm>
#include <limits>

#include "isa.h"
#include "mix_draw.h"

namespace mdk {
namespace {

constexpr int64_t kGroupsPerBlock = kMixBlock / kMixGroup;

}  // namespace

MixDraw::MixDraw(const MixArgs& a, const MixFilter& f, double temperature, int extra,
                 bool with_maxima)
    : args(a),
      filter(f),
      also(extra),
      sums(a, with_maxima),
      scores(a.width),
      group_maxima(a.blocks() * kGroupsPerBlock),
      scale(static_cast<float>(std::min(1.0 / temperature, 1e30))) {}

void MixDraw::needed(int64_t row, bool* flags) const {
  args.needed(row, false, false, flags);
  if (also >= 0) flags[also] = true;
}

void MixDraw::pass_sums(int64_t row, int64_t begin, int64_t end) {
  bool flags[kMixTerms];
  needed(row, flags);
  sums.sum(args, row, flags, begin, end);
}

MixRow MixDraw::normalise(int64_t row) const {
  bool flags[kMixTerms];
  needed(row, flags);
  return MixRow(args, row, flags, sums);
}

void MixDraw::pass_scores(const MixRow& mix, int64_t begin, int64_t end) {
  const int64_t first = begin * kMixBlock, last = std::min(end * kMixBlock, args.width);
  kernels().mix.write(mix.terms, mix.count, first, last, 0.0f, scores.data() + first, 0);
  kernels().mix.group_max(scores.data() + first, last - first,
                          group_maxima.data() + begin * kGroupsPerBlock);
}

float MixDraw::highest() const {
  const int64_t groups = (args.width + kMixGroup - 1) / kMixGroup;
  return *std::max_element(group_maxima.begin(), group_maxima.begin() + groups);
}

void MixDraw::find_cutoff() {
  max = highest();
  cutoff =
      mix_cutoff(filter, scores.data(), group_maxima.data(), args.width, max, scale, candidates);
}

MdkRace MixDraw::pass_race(uint64_t seed, uint64_t offset, MixStream stream, bool linear,
                           int64_t begin, int64_t end) const {
  MdkRace race = {scores.data(),
                  group_maxima.data(),
                  max,
                  scale,
                  cutoff.score,
                  cutoff.last_tie,
                  seed,
                  offset,
                  stream,
                  linear,
                  std::numeric_limits<double>::infinity(),
                  -1};
  kernels().mix.race(&race, begin * kMixBlock, std::min(end * kMixBlock, args.width));
  return race;
}

}  // namespace mdk
