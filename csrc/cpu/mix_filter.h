// Top-k, top-p and min-p as one cutoff: each of them keeps a prefix of the tokens sorted by (score
// descending, id ascending), so their chain is the last token that is kept. Only the tokens around
// the cutoff are ever sorted.
#pragma once
#include <cstdint>
#include <vector>

namespace mdk {

struct MixFilter {
  int64_t top_k;  // 0: off
  double top_p;   // 1: off
  double min_p;   // 0: off
};

// Kept: score > cutoff, or score == cutoff and id <= last_tie.
struct MixCutoff {
  float score;
  int64_t last_tie;
};

// Scratch: the tokens that a filter still has to tell apart, in the order of their ids.
struct MixCandidates {
  std::vector<int32_t> ids;
  std::vector<float> scores;
  std::vector<float> work;
  int64_t count = 0;  // the vectors only ever grow
};

// scores[0, width) with the maxima of its groups of kMixGroup; a token's probability is
// proportional to exp((score - max) * scale).
MixCutoff mix_cutoff(const MixFilter& filter, const float* scores, const float* group_maxima,
                     int64_t width, float max, float scale, MixCandidates& candidates);

}  // namespace mdk
