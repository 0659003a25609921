// One row of the mixture on its way to a token, as mix_sample and mix_verify go it: sums, scores,
// cutoff, race. A pass over a range of blocks may be one thread's share of the row; what lies
// between the passes runs on one thread.
#pragma once
#include "mix_driver.h"
#include "mix_filter.h"

namespace mdk {

// Philox streams of the high words; the low ones are next to them. See mix_sample/README.md.
enum MixStream : uint32_t {
  kTokenStream = 0,
  kComponentStream = 2,
  kAcceptStream = 4,
  kResidualStream = 6
};

struct MixDraw {
  const MixArgs& args;
  const MixFilter filter;
  const int also;  // an input that is looked at whatever its weight, or -1
  MixScratch sums;
  std::vector<float> scores, group_maxima;
  MixCandidates candidates;
  float scale, max;  // 1 / temperature; of the scores
  MixCutoff cutoff;

  MixDraw(const MixArgs& args, const MixFilter& filter, double temperature, int also = -1,
          bool with_maxima = false);

  void needed(int64_t row, bool* flags) const;
  void pass_sums(int64_t row, int64_t begin, int64_t end);
  MixRow normalise(int64_t row) const;
  void pass_scores(const MixRow& mix, int64_t begin, int64_t end);
  // Fills `max` and `cutoff`.
  void find_cutoff();
  // `linear`: the scores are what the tokens' probabilities are proportional to, not logarithms.
  MdkRace pass_race(uint64_t seed, uint64_t offset, MixStream stream, bool linear, int64_t begin,
                    int64_t end) const;

  float highest() const;  // of the scores, from the maxima of their groups
};

}  // namespace mdk
