#pragma once
#include "mix_driver.h"
#include "mix_filter.h"

namespace mdk {

struct MixSampleArgs {
  double temperature;  // positive
  MixFilter filter;
  const int64_t* seeds;    // (rows)
  const int64_t* offsets;  // (rows)
  int64_t* tokens;         // (rows)
};

// A row without a distribution (a log-softmax in it is NaN) is a fault; tokens are then undefined.
Fault mix_sample(const MixArgs& args, const MixSampleArgs& sample, int threads);

// Which model each row draws from, by its weights: (rows, memories), 1 for that memory, else 0. The
// logits are not looked at.
Fault mix_choose(const MixArgs& args, const int64_t* seeds, const int64_t* offsets, float* out);

// Log-probability of one token per row: (rows, 1 + inputs), the mixture's, then each model's.
void mix_logprobs(const MixArgs& args, const int64_t* tokens, float* out, int threads);

}  // namespace mdk
