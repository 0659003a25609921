// logit_mix and mix_argmax on the host: weights, terms and threads. mix_sample_driver.cpp builds on
// the same pieces.
#pragma once
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "parallel.h"

namespace mdk {

// One model's logits, (rows, width) with unit stride within a row.
struct MixInput {
  const char* logits;
  int64_t row_bytes;
  int64_t width;
  int dtype;
  float scale;  // 1 / temperature

  const void* row(int64_t i) const { return logits + i * row_bytes; }
  int64_t blocks() const { return (width + kMixBlock - 1) / kMixBlock; }
};

struct MixArgs {
  int64_t rows, width;           // of the result
  std::vector<MixInput> inputs;  // the base first, then the memories
  std::vector<double> weights;   // one per input, adding up to 1; used when row_weights is null
  const float* row_weights;      // (rows, memories), or null
  int64_t weight_stride;         // elements between rows
  int64_t weight_step;           // elements between memories

  int count() const { return static_cast<int>(inputs.size()); }
  int64_t blocks() const { return (width + kMixBlock - 1) / kMixBlock; }
  // One per input, adding up to 1.
  void weights_of(int64_t row, double* out) const;
  // Which inputs have to be read for a row: those with a weight, and those the caller wants.
  void needed(int64_t row, bool all, bool base, bool* flags) const;
};

// The first row whose weights are not in [0, 1] with a sum of at most 1.
Fault check_mix_weights(const MixArgs& args);

// Where the passes over a row leave what the row as a whole needs.
struct MixScratch {
  std::vector<MdkMixBlock> blocks;  // [input][block]
  std::vector<float> maxima;        // [input][part][lane], or empty
  int64_t blocks_per_input, maxima_per_input;

  MixScratch(const MixArgs& args, bool with_maxima);
  // Partial sums of blocks [begin, end) of the inputs flagged in `needed`.
  void sum(const MixArgs& args, int64_t row, const bool* needed, int64_t begin, int64_t end);
};

struct MixRow {
  MdkMixTerm terms[kMixTerms];  // the inputs of weight > 0, in order
  int input[kMixTerms];         // which input a term is
  int count;
  bool valid;            // false: a log-softmax in it is NaN, so the row is
  float max[kMixTerms];  // per needed input: its log-sum-exp is max * scale + log_sum
  double log_sum[kMixTerms];

  MixRow(const MixArgs& args, int64_t row, const bool* needed, const MixScratch& scratch);
};

// How the work is laid over threads. Many rows: whole rows. Few: every row is cut into ranges of
// blocks, and the threads meet between the passes.
struct MixPlan {
  int threads;
  bool split;
  int64_t chunk;  // rows handed out at a time

  MixPlan(const MixArgs& args, int requested);
};

// Calls fn(row, block_begin, block_end) over the share of one of `threads` threads.
template <class Fn>
void mix_share(const MixArgs& args, int thread, int threads, Fn&& fn) {
  const int64_t blocks = args.blocks(), units = args.rows * blocks;
  int64_t unit = units * thread / threads;
  const int64_t stop = units * (thread + 1) / threads;
  while (unit < stop) {
    const int64_t row = unit / blocks, begin = unit - row * blocks;
    const int64_t end = begin + (stop - unit) < blocks ? begin + (stop - unit) : blocks;
    fn(row, begin, end);
    unit += end - begin;
  }
}

// Writes (rows, width) fp32. With `base_scale`, log p + lse(base).
Fault logit_mix(const MixArgs& args, bool base_scale, float* out, int64_t out_stride, int threads);

// Writes (rows) ids; 0 for a row that is NaN.
Fault mix_argmax(const MixArgs& args, int64_t* ids, int threads);

}  // namespace mdk
