#include "mix_sample_driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "isa.h"
#include "mix_draw.h"

namespace mdk {
namespace {

MdkRace race(const MixDraw& draw, const MixSampleArgs& sample, int64_t row, int64_t begin,
             int64_t end) {
  return draw.pass_race(static_cast<uint64_t>(sample.seeds[row]),
                        static_cast<uint64_t>(sample.offsets[row]), kTokenStream, false, begin,
                        end);
}

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

void remember_first(std::atomic<int64_t>& first, int64_t row) {
  int64_t seen = first.load();
  while (row < seen && !first.compare_exchange_weak(seen, row)) {
  }
}

void draw_rows(const MixArgs& args, const MixSampleArgs& sample, const MixPlan& plan,
               std::atomic<int64_t>& bad_row) {
  std::vector<MixDraw> draws(plan.threads, MixDraw(args, sample.filter, sample.temperature));
  parallel_rows(args.rows, plan.threads, plan.chunk, [&](int thread, int64_t row, int64_t end) {
    MixDraw& draw = draws[thread];
    const int64_t blocks = args.blocks();
    for (; row < end; ++row) {
      draw.pass_sums(row, 0, blocks);
      const MixRow mix = draw.normalise(row);
      if (!mix.valid) {
        remember_first(bad_row, row);
        continue;
      }
      draw.pass_scores(mix, 0, blocks);
      draw.find_cutoff();
      sample.tokens[row] = race(draw, sample, row, 0, blocks).token;
    }
  });
}

void draw_split(const MixArgs& args, const MixSampleArgs& sample, const MixPlan& plan,
                std::atomic<int64_t>& bad_row) {
  std::vector<MixDraw> draws(args.rows, MixDraw(args, sample.filter, sample.temperature));
  std::vector<MdkRace> found(plan.threads * args.rows, MdkRace{});
  for (MdkRace& none : found) none.token = -1;
#pragma omp parallel num_threads(plan.threads)
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    mix_share(args, thread, threads, [&](int64_t row, int64_t begin, int64_t end) {
      draws[row].pass_sums(row, begin, end);
    });
#pragma omp barrier
    mix_share(args, thread, threads, [&](int64_t row, int64_t begin, int64_t end) {
      const MixRow mix = draws[row].normalise(row);
      if (mix.valid)
        draws[row].pass_scores(mix, begin, end);
      else
        remember_first(bad_row, row);
    });
#pragma omp barrier
    if (bad_row.load() == kNone) {  // the same for all threads: nobody writes it any more
#pragma omp for schedule(dynamic, 1)
      for (int64_t row = 0; row < args.rows; ++row) draws[row].find_cutoff();
      mix_share(args, thread, threads, [&](int64_t row, int64_t begin, int64_t end) {
        found[thread * args.rows + row] = race(draws[row], sample, row, begin, end);
      });
    }
  }
  if (bad_row.load() != kNone) return;
  for (int64_t row = 0; row < args.rows; ++row) {
    const MdkRace* best = nullptr;  // shares ascend with the thread: the first of equals wins
    for (int thread = 0; thread < plan.threads; ++thread) {
      const MdkRace& other = found[thread * args.rows + row];
      if (other.token >= 0 && (best == nullptr || other.key < best->key)) best = &other;
    }
    sample.tokens[row] = best->token;
  }
}

}  // namespace

Fault mix_sample(const MixArgs& args, const MixSampleArgs& sample, int requested) {
  if (Fault fault = check_mix_weights(args); fault.what) return fault;
  std::atomic<int64_t> bad_row{kNone};
  const MixPlan plan(args, requested);
  if (plan.split)
    draw_split(args, sample, plan, bad_row);
  else
    draw_rows(args, sample, plan, bad_row);
  if (bad_row.load() != kNone) return {"nan_row", bad_row.load(), 0};
  return no_fault;
}

Fault mix_choose(const MixArgs& args, const int64_t* seeds, const int64_t* offsets, float* out) {
  if (Fault fault = check_mix_weights(args); fault.what) return fault;
  const int models = args.count();
  for (int64_t row = 0; row < args.rows; ++row) {
    double shares[kMixTerms];
    args.weights_of(row, shares);
    int chosen = 0;
    double first = std::numeric_limits<double>::infinity();
    for (int k = 0; k < models; ++k) {
      const double clock =
          kernels().mix.exponential(static_cast<uint64_t>(seeds[row]),
                                    static_cast<uint64_t>(offsets[row]), kComponentStream, k) /
          shares[k];
      if (clock < first) {
        first = clock;
        chosen = k;
      }
    }
    for (int k = 1; k < models; ++k) *out++ = k == chosen ? 1.0f : 0.0f;
  }
  return no_fault;
}

void mix_logprobs(const MixArgs& args, const int64_t* tokens, float* out, int requested) {
  const int terms = args.count();
  const auto finish = [&](int64_t row, const bool* needed, const MixScratch& sums) {
    const MixRow mix(args, row, needed, sums);
    const int64_t token = tokens[row];
    float* to = out + row * (1 + terms);
    if (token < 0 || token >= args.width) {  // -1: the row had no distribution to draw from
      std::fill(to, to + 1 + terms, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    if (mix.valid)
      kernels().mix.write(mix.terms, mix.count, token, token + 1, 0.0f, to, 0);
    else
      *to = std::numeric_limits<float>::quiet_NaN();
    for (int k = 0; k < terms; ++k) {
      const MixInput& in = args.inputs[k];
      const auto offset = static_cast<float>(-mix.log_sum[k]);
      const MdkMixTerm term = {in.row(row), in.width, in.dtype, in.scale, mix.max[k], offset};
      kernels().mix.write(&term, 1, token, token + 1, 0.0f, to + 1 + k, 0);
    }
  };
  bool all[kMixTerms];
  std::fill(all, all + kMixTerms, true);
  const MixPlan plan(args, requested);
  std::vector<MixScratch> sums(plan.split ? args.rows : plan.threads, MixScratch(args, false));
  if (!plan.split) {
    parallel_rows(args.rows, plan.threads, plan.chunk, [&](int thread, int64_t row, int64_t end) {
      for (; row < end; ++row) {
        sums[thread].sum(args, row, all, 0, args.blocks());
        finish(row, all, sums[thread]);
      }
    });
    return;
  }
#pragma omp parallel num_threads(plan.threads)
  mix_share(
      args, omp_get_thread_num(), omp_get_num_threads(),
      [&](int64_t row, int64_t begin, int64_t end) { sums[row].sum(args, row, all, begin, end); });
  for (int64_t row = 0; row < args.rows; ++row) finish(row, all, sums[row]);
}

}  // namespace mdk
