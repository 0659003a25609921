// The part of the kernel table behind logit_mix, mix_argmax, mix_sample and mix_verify; included by
// kernels.h and bound by its rules. Weights, temperatures and threads live in mix_driver.cpp: here
// a row of the mixture is a list of terms, and every function works on a range of one row.
//
// Whatever depends on the order of a summation is stored per block of kMixBlock elements, so that
// a result has the same bits however a row is split over threads.
#pragma once
#include <stdint.h>

constexpr int kMixTerms = 16;        // models in one mixture
constexpr int64_t kMixBlock = 2048;  // elements per partial sum
constexpr int64_t kMixPart = 512;    // elements per set of lane maxima (mix_argmax)
constexpr int kMixBounds = 8;        // thresholds that are measured at a time
constexpr int64_t kMixGroup = 64;    // elements per maximum (mix_sample)

// Sum over one block of exp((x - reference) * scale).
struct MdkMixBlock {
  float reference, sum;
};

// One model's share of one row: log w + log_softmax(x * scale) = (x - max) * scale + offset.
struct MdkMixTerm {
  const void* row;
  int64_t width;
  int dtype;
  float scale, max, offset;
};

// argmin over the kept tokens of E_j / exp((score_j - max) * scale), or, if `linear`, of
// E_j / score_j; E_j from Philox.
// Kept: score > cutoff, or score == cutoff and id <= last_tie.
struct MdkRace {
  const float* scores;
  const float* group_maxima;
  float max, scale;
  float cutoff;
  int64_t last_tie;
  uint64_t seed, offset;
  uint32_t stream;
  int linear;
  double key;  // out, with `token`: the best so far; start with infinity and -1
  int64_t token;
};

struct MdkMixKernels {
  // Partial sums of blocks [block_begin, block_end) of a row. With `maxima`, also the lane maxima
  // of its parts: W floats per part, from part 0 of the row on.
  void (*sums)(const void* row, int dtype, int64_t width, float scale, int64_t block_begin,
               int64_t block_end, MdkMixBlock* blocks, float* maxima);
  // out[i - begin] = log sum_k exp(term_k[i]) + shift for i in [begin, end); -inf where no term
  // reaches.
  void (*write)(const MdkMixTerm* terms, int count, int64_t begin, int64_t end, float shift,
                float* out, int streaming);
  // The best id among parts [part_begin, part_end) and its score, which is comparable within the
  // row. maxima[k] belongs to term k.
  void (*best)(const MdkMixTerm* terms, const float* const* maxima, int count, int64_t part_begin,
               int64_t part_end, float* score, int64_t* id);
  // Maxima of the groups of scores[0, n): how mix_sample narrows a search without sorting.
  void (*group_max)(const float* scores, int64_t n, float* maxima);
  // ids and scores of low <= score < high, in order; room for n. Returns how many.
  int64_t (*collect)(const float* scores, int64_t n, float low, float high, int32_t* ids,
                     float* kept);
  // mass[i]: sum of exp((score - max) * scale) over scores >= bounds[i], for kMixBounds bounds.
  void (*mass_above)(const float* scores, int64_t n, float max, float scale, const float* bounds,
                     double* mass);
  // begin is a multiple of kMixGroup.
  void (*race)(MdkRace* race, int64_t begin, int64_t end);
  // scores[i] becomes the positive part of p - exp(draft[i]), where p is
  // exp((score - max) * scale - log_mass) if score >= cutoff, else 0.
  void (*residual)(float* scores, const float* draft, int64_t n, float max, float scale,
                   float log_mass, float cutoff);
  // One exponential variate, of streams `stream` and `stream + 1`.
  double (*exponential)(uint64_t seed, uint64_t offset, uint32_t stream, int64_t token);
  int lanes;  // W
};
