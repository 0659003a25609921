#include "mix_sample_driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "isa.h"

namespace mdk {
namespace {

constexpr int64_t kGroupsPerBlock = kMixBlock / kMixGroup;

// One row on its way to a token. The passes over ranges of blocks may run on several threads; what
// lies between them runs on one.
struct Draw {
  const MixArgs& args;
  const MixSampleArgs& sample;
  MixScratch sums;
  std::vector<float> scores, group_maxima;
  MixCandidates candidates;
  float scale, max;
  MixCutoff cutoff;

  Draw(const MixArgs& a, const MixSampleArgs& s)
      : args(a),
        sample(s),
        sums(a, false),
        scores(a.width),
        group_maxima(a.blocks() * kGroupsPerBlock),
        scale(static_cast<float>(std::min(1.0 / s.temperature, 1e30))) {}

  void pass_sums(int64_t row, int64_t begin, int64_t end) {
    bool needed[kMixTerms];
    args.needed(row, false, false, needed);
    sums.sum(args, row, needed, begin, end);
  }

  MixRow normalise(int64_t row) const {
    bool needed[kMixTerms];
    args.needed(row, false, false, needed);
    return MixRow(args, row, needed, sums);
  }

  void pass_scores(const MixRow& mix, int64_t begin, int64_t end) {
    const int64_t first = begin * kMixBlock, last = std::min(end * kMixBlock, args.width);
    kernels().mix.write(mix.terms, mix.count, first, last, 0.0f, scores.data() + first, 0);
    kernels().mix.group_max(scores.data() + first, last - first,
                            group_maxima.data() + begin * kGroupsPerBlock);
  }

  void filter() {
    const int64_t groups = (args.width + kMixGroup - 1) / kMixGroup;
    max = *std::max_element(group_maxima.begin(), group_maxima.begin() + groups);
    cutoff = mix_cutoff(sample.filter, scores.data(), group_maxima.data(), args.width, max, scale,
                        candidates);
  }

  MdkRace pass_race(int64_t row, int64_t begin, int64_t end) const {
    MdkRace race = {scores.data(),
                    group_maxima.data(),
                    max,
                    scale,
                    cutoff.score,
                    cutoff.last_tie,
                    static_cast<uint64_t>(sample.seeds[row]),
                    static_cast<uint64_t>(sample.offsets[row]),
                    std::numeric_limits<double>::infinity(),
                    -1};
    kernels().mix.race(&race, begin * kMixBlock, std::min(end * kMixBlock, args.width));
    return race;
  }
};

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

void remember_first(std::atomic<int64_t>& first, int64_t row) {
  int64_t seen = first.load();
  while (row < seen && !first.compare_exchange_weak(seen, row)) {
  }
}

void draw_rows(const MixArgs& args, const MixSampleArgs& sample, const MixPlan& plan,
               std::atomic<int64_t>& bad_row) {
  std::vector<Draw> draws(plan.threads, Draw(args, sample));
  parallel_rows(args.rows, plan.threads, plan.chunk, [&](int thread, int64_t row, int64_t end) {
    Draw& draw = draws[thread];
    const int64_t blocks = args.blocks();
    for (; row < end; ++row) {
      draw.pass_sums(row, 0, blocks);
      const MixRow mix = draw.normalise(row);
      if (!mix.valid) {
        remember_first(bad_row, row);
        continue;
      }
      draw.pass_scores(mix, 0, blocks);
      draw.filter();
      sample.tokens[row] = draw.pass_race(row, 0, blocks).token;
    }
  });
}

void draw_split(const MixArgs& args, const MixSampleArgs& sample, const MixPlan& plan,
                std::atomic<int64_t>& bad_row) {
  std::vector<Draw> draws(args.rows, Draw(args, sample));
  std::vector<MdkRace> found(plan.threads * args.rows, MdkRace{});
  for (MdkRace& race : found) race.token = -1;
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
      for (int64_t row = 0; row < args.rows; ++row) draws[row].filter();
      mix_share(args, thread, threads, [&](int64_t row, int64_t begin, int64_t end) {
        found[thread * args.rows + row] = draws[row].pass_race(row, begin, end);
      });
    }
  }
  if (bad_row.load() != kNone) return;
  for (int64_t row = 0; row < args.rows; ++row) {
    const MdkRace* best = nullptr;  // shares ascend with the thread: the first of equals wins
    for (int thread = 0; thread < plan.threads; ++thread) {
      const MdkRace& race = found[thread * args.rows + row];
      if (race.token >= 0 && (best == nullptr || race.key < best->key)) best = &race;
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

void mix_logprobs(const MixArgs& args, const int64_t* tokens, float* out, int requested) {
  const int terms = args.count();
  const auto finish = [&](int64_t row, const bool* needed, const MixScratch& sums) {
    const MixRow mix(args, row, needed, sums);
    const int64_t token = tokens[row];
    float* to = out + row * (1 + terms);
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
