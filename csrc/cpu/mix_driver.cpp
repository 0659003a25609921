#include "mix_driver.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"

namespace mdk {
namespace {

// Rounding of weights that were meant to add up to 1.
constexpr double kWeightSlack = 1e-6;

// Below this a parallel region costs more than it saves.
constexpr int64_t kElementsPerThread = 8192;

// Stores that bypass the caches pay once the output no longer fits the second-level caches.
constexpr int64_t kStreamBytes = 4 << 20;

}  // namespace

// The sum of fp32 weights is rounded to fp32, so that weights like (0.7, 0.2, 0.1)
// leave the base exactly nothing.
void MixArgs::weights_of(int64_t row, double* out) const {
  if (row_weights == nullptr) {
    std::copy(weights.begin(), weights.end(), out);
    return;
  }
  double sum = 0.0;
  for (int k = 1; k < count(); ++k) {
    out[k] = row_weights[row * weight_stride + (k - 1) * weight_step];
    sum += out[k];
  }
  out[0] = std::max(0.0, 1.0 - static_cast<float>(sum));
}

void MixArgs::needed(int64_t row, bool all, bool base, bool* flags) const {
  double shares[kMixTerms];
  weights_of(row, shares);
  for (int k = 0; k < count(); ++k) flags[k] = all || shares[k] > 0.0 || (base && k == 0);
}

Fault check_mix_weights(const MixArgs& args) {
  if (args.row_weights == nullptr) return no_fault;
  for (int64_t row = 0; row < args.rows; ++row) {
    double sum = 0.0;
    for (int k = 0; k + 1 < args.count(); ++k) {
      const float w = args.row_weights[row * args.weight_stride + k * args.weight_step];
      if (!(w >= 0.0f && w <= 1.0f)) return {"mix_weight", row, k};
      sum += w;
    }
    if (sum > 1.0 + kWeightSlack) return {"mix_weight_sum", row, 0};
  }
  return no_fault;
}

MixScratch::MixScratch(const MixArgs& args, bool with_maxima) {
  const int64_t parts = args.blocks() * (kMixBlock / kMixPart);
  blocks_per_input = args.blocks();
  maxima_per_input = with_maxima ? parts * kernels().mix.lanes : 0;
  blocks.resize(args.count() * blocks_per_input);
  maxima.resize(args.count() * maxima_per_input);
}

void MixScratch::sum(const MixArgs& args, int64_t row, const bool* needed, int64_t begin,
                     int64_t end) {
  for (int k = 0; k < args.count(); ++k) {
    const MixInput& input = args.inputs[k];
    const int64_t last = std::min(end, input.blocks());
    if (!needed[k] || begin >= last) continue;
    kernels().mix.sums(input.row(row), input.dtype, input.width, input.scale, begin, last,
                       blocks.data() + k * blocks_per_input,
                       maxima.empty() ? nullptr : maxima.data() + k * maxima_per_input);
  }
}

MixRow::MixRow(const MixArgs& args, int64_t row, const bool* needed, const MixScratch& scratch)
    : count(0), valid(true) {
  double weights[kMixTerms];
  args.weights_of(row, weights);
  for (int k = 0; k < args.count(); ++k) {
    if (!needed[k]) continue;
    const MixInput& in = args.inputs[k];
    const MdkMixBlock* blocks = scratch.blocks.data() + k * scratch.blocks_per_input;
    max[k] = blocks[0].reference;
    for (int64_t b = 1; b < in.blocks(); ++b) max[k] = std::max(max[k], blocks[b].reference);
    double sum = 0.0;  // in the order of the blocks, whichever thread computed them
    for (int64_t b = 0; b < in.blocks(); ++b) {
      const double distance = static_cast<double>(blocks[b].reference) - max[k];
      sum += distance == 0.0 ? blocks[b].sum : blocks[b].sum * std::exp(distance * in.scale);
    }
    log_sum[k] = std::log(sum);
    if (!(weights[k] > 0.0)) continue;
    valid = valid && std::isfinite(log_sum[k]);
    const auto offset = static_cast<float>(std::log(weights[k]) - log_sum[k]);
    terms[count] = {in.row(row), in.width, in.dtype, in.scale, max[k], offset};
    input[count++] = k;
  }
}

MixPlan::MixPlan(const MixArgs& args, int requested) {
  const int64_t worthwhile = 1 + args.rows * args.width / kElementsPerThread;
  threads = usable_threads(std::min(worthwhile, args.rows * args.blocks()), requested);
  split = threads > 1 && args.rows < 4 * threads;
  chunk = std::max<int64_t>(1, args.rows / (8 * threads));
}

Fault logit_mix(const MixArgs& args, bool base_scale, float* out, int64_t out_stride,
                int requested) {
  if (Fault fault = check_mix_weights(args); fault.what) return fault;
  const bool streaming = args.rows * args.width * int64_t{sizeof(float)} >= kStreamBytes;
  const auto write = [&](int64_t row, const bool* needed, const MixScratch& scratch, int64_t begin,
                         int64_t end) {
    const MixRow mix(args, row, needed, scratch);
    float* to = out + row * out_stride;
    if (!mix.valid) {
      std::fill(to + begin, to + end, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    const float shift = base_scale ? static_cast<float>(mix.max[0] + mix.log_sum[0]) : 0.0f;
    kernels().mix.write(mix.terms, mix.count, begin, end, shift, to + begin, streaming);
  };

  const MixPlan plan(args, requested);
  if (!plan.split) {
    std::vector<MixScratch> scratch(plan.threads, MixScratch(args, false));
    parallel_rows(args.rows, plan.threads, plan.chunk, [&](int thread, int64_t row, int64_t end) {
      for (; row < end; ++row) {
        bool needed[kMixTerms];
        args.needed(row, false, base_scale, needed);
        scratch[thread].sum(args, row, needed, 0, args.blocks());
        write(row, needed, scratch[thread], 0, args.width);
      }
    });
    return no_fault;
  }
  std::vector<MixScratch> scratch(args.rows, MixScratch(args, false));
#pragma omp parallel num_threads(plan.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    bool needed[kMixTerms];
    mix_share(args, thread, threads, [&](int64_t row, int64_t begin, int64_t end) {
      args.needed(row, false, base_scale, needed);
      scratch[row].sum(args, row, needed, begin, end);
    });
#pragma omp barrier
    mix_share(args, thread, threads, [&](int64_t row, int64_t begin, int64_t end) {
      args.needed(row, false, base_scale, needed);
      write(row, needed, scratch[row], begin * kMixBlock, std::min(end * kMixBlock, args.width));
    });
  }
  return no_fault;
}

Fault mix_argmax(const MixArgs& args, int64_t* ids, int requested) {
  if (Fault fault = check_mix_weights(args); fault.what) return fault;
  struct Best {
    float score;
    int64_t id;
  };
  constexpr int64_t parts_per_block = kMixBlock / kMixPart;
  const int64_t parts = (args.width + kMixPart - 1) / kMixPart;
  const auto search = [&](int64_t row, const bool* needed, const MixScratch& scratch, int64_t begin,
                          int64_t end) {
    const MixRow mix(args, row, needed, scratch);
    Best best = {-std::numeric_limits<float>::infinity(), -1};
    if (!mix.valid) return best;
    const float* maxima[kMixTerms];
    for (int i = 0; i < mix.count; ++i)
      maxima[i] = scratch.maxima.data() + mix.input[i] * scratch.maxima_per_input;
    kernels().mix.best(mix.terms, maxima, mix.count, begin * parts_per_block,
                       std::min(end * parts_per_block, parts), &best.score, &best.id);
    return best;
  };

  const MixPlan plan(args, requested);
  if (!plan.split) {
    std::vector<MixScratch> scratch(plan.threads, MixScratch(args, true));
    parallel_rows(args.rows, plan.threads, plan.chunk, [&](int thread, int64_t row, int64_t end) {
      for (; row < end; ++row) {
        bool needed[kMixTerms];
        args.needed(row, false, false, needed);
        scratch[thread].sum(args, row, needed, 0, args.blocks());
        ids[row] = search(row, needed, scratch[thread], 0, args.blocks()).id;
      }
    });
    return no_fault;
  }
  std::vector<MixScratch> scratch(args.rows, MixScratch(args, true));
  std::vector<Best> found(plan.threads * args.rows, Best{-1.0f, -1});
#pragma omp parallel num_threads(plan.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    bool needed[kMixTerms];
    mix_share(args, thread, threads, [&](int64_t row, int64_t begin, int64_t end) {
      args.needed(row, false, false, needed);
      scratch[row].sum(args, row, needed, begin, end);
    });
#pragma omp barrier
    mix_share(args, thread, threads, [&](int64_t row, int64_t begin, int64_t end) {
      args.needed(row, false, false, needed);
      found[thread * args.rows + row] = search(row, needed, scratch[row], begin, end);
    });
  }
  for (int64_t row = 0; row < args.rows; ++row) {
    Best best = {0.0f, -1};  // shares ascend with the thread, so the first of equals is smallest
    for (int thread = 0; thread < plan.threads; ++thread) {
      const Best& other = found[thread * args.rows + row];
      if (other.id >= 0 && (best.id < 0 || other.score > best.score)) best = other;
    }
    ids[row] = best.id;
  }
  return no_fault;
}

}  // namespace mdk
