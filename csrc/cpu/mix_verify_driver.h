#pragma once
#include "mix_driver.h"
#include "mix_filter.h"

namespace mdk {

// The logits of a request's positions are consecutive rows of `MixArgs`.
struct MixVerifyArgs {
  int64_t positions;             // of a request: the most that it can have drafted, and one
  int draft;                     // the input that the tokens were drawn from, at its scale
  const int64_t* draft_ids;      // (requests, positions - 1)
  const int64_t* draft_lengths;  // (requests)
  double temperature;            // 0: greedy
  MixFilter filter;
  const int64_t* seeds;    // (requests)
  const int64_t* offsets;  // (requests), of the first position
  int64_t* num_accepted;   // (requests)
  int64_t* tokens;         // (requests, positions)
};

// The outputs are undefined after a fault.
Fault mix_verify(const MixArgs& args, const MixVerifyArgs& verify, int threads);

}  // namespace mdk
