#include "mix_verify_driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "isa.h"
#include "mix_draw.h"

namespace mdk {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Splits a row over the threads that work on it.
template <class Fn>
void over_blocks(int threads, int64_t blocks, Fn&& fn) {
  if (threads == 1) {
    fn(0, int64_t{0}, blocks);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    fn(thread, blocks * thread / all, blocks * (thread + 1) / all);
  }
}

// The positions of one request in order, up to the first rejection: nothing is read beyond it.
class Verifier {
 public:
  Verifier(const MixArgs& args, const MixVerifyArgs& verify, int threads)
      : args_(args),
        verify_(verify),
        threads_(threads),
        greedy_(verify.temperature == 0.0),
        processed_(verify.temperature != 1.0 || verify.filter.top_k > 0 ||
                   verify.filter.top_p < 1.0 || verify.filter.min_p > 0.0),
        draw_(args, verify.filter, greedy_ ? 1.0 : verify.temperature, greedy_ ? -1 : verify.draft,
              greedy_),
        draft_scores_(greedy_ ? 0 : args.width) {}

  // The first position without a distribution, or -1.
  int64_t request(int64_t index) {
    const int64_t* drafted = verify_.draft_ids + index * (verify_.positions - 1);
    const int64_t length = verify_.draft_lengths[index];
    int64_t* tokens = verify_.tokens + index * verify_.positions;
    std::fill(tokens, tokens + verify_.positions, -1);
    seed_ = static_cast<uint64_t>(verify_.seeds[index]);
    for (int64_t i = 0;; ++i) {
      row_ = index * verify_.positions + i;
      offset_ = static_cast<uint64_t>(verify_.offsets[index]) + static_cast<uint64_t>(i);
      over_blocks(threads_, args_.blocks(),
                  [&](int, int64_t begin, int64_t end) { draw_.pass_sums(row_, begin, end); });
      const MixRow mix = draw_.normalise(row_);
      const bool exists = greedy_ || i == length || std::isfinite(mix.log_sum[verify_.draft]);
      if (!mix.valid || !exists) return row_;
      verify_.num_accepted[index] = i;
      if (greedy_) {
        tokens[i] = best(mix);
        if (i == length || tokens[i] != drafted[i]) return -1;
        continue;
      }
      if (i == length) {
        score(mix);
        draw_.find_cutoff();
        tokens[i] = race(kTokenStream, false);
        return -1;
      }
      if (!accepts(mix, drafted[i])) {
        tokens[i] = resample(mix);
        return -1;
      }
      tokens[i] = drafted[i];
    }
  }

 private:
  int64_t best(const MixRow& mix) {
    const float* maxima[kMixTerms];
    for (int i = 0; i < mix.count; ++i)
      maxima[i] = draw_.sums.maxima.data() + mix.input[i] * draw_.sums.maxima_per_input;
    float score;
    int64_t id;
    const int64_t parts = (args_.width + kMixPart - 1) / kMixPart;
    kernels().mix.best(mix.terms, maxima, mix.count, 0, parts, &score, &id);
    return std::max<int64_t>(id, 0);
  }

  void score(const MixRow& mix) {
    over_blocks(threads_, args_.blocks(),
                [&](int, int64_t begin, int64_t end) { draw_.pass_scores(mix, begin, end); });
  }

  MdkMixTerm draft_term(const MixRow& mix) const {
    const MixInput& in = args_.inputs[verify_.draft];
    return {in.row(row_),
            in.width,
            in.dtype,
            in.scale,
            mix.max[verify_.draft],
            static_cast<float>(-mix.log_sum[verify_.draft])};
  }

  // E >= log q' - log v with E ~ Exp(1) has the probability min(1, v / q').
  bool accepts(const MixRow& mix, int64_t token) {
    const MdkMixTerm draft = draft_term(mix);
    float log_draft, log_target;
    kernels().mix.write(&draft, 1, token, token + 1, 0.0f, &log_draft, 0);
    if (processed_) {
      score(mix);
      process();
      const float score = draw_.scores[token];
      log_target =
          score >= draw_.cutoff.score ? (score - draw_.max) * draw_.scale - log_mass_ : -kInfinity;
    } else {
      kernels().mix.write(mix.terms, mix.count, token, token + 1, 0.0f, &log_target, 0);
    }
    const double e = kernels().mix.exponential(seed_, offset_, kAcceptStream, 0);
    return e >= static_cast<double>(log_draft) - static_cast<double>(log_target);
  }

  // From scores to the processed target: exp((score - max) scale - log_mass) from the cutoff on.
  void process() {
    draw_.find_cutoff();
    for (int64_t id = draw_.cutoff.last_tie + 1; id < args_.width; ++id)
      if (draw_.scores[id] == draw_.cutoff.score) draw_.scores[id] = -kInfinity;
    float bounds[kMixBounds];
    double mass[kMixBounds];
    std::fill(bounds, bounds + kMixBounds, draw_.cutoff.score);
    kernels().mix.mass_above(draw_.scores.data(), args_.width, draw_.max, draw_.scale, bounds,
                             mass);
    log_mass_ = static_cast<float>(std::log(mass[0]));
  }

  int64_t resample(const MixRow& mix) {
    if (!processed_) {
      score(mix);
      draw_.max = log_mass_ = 0.0f;
      draw_.cutoff = {-kInfinity, args_.width};
    }
    const MdkMixTerm draft = draft_term(mix);
    over_blocks(threads_, args_.blocks(), [&](int, int64_t begin, int64_t end) {
      const int64_t first = begin * kMixBlock, last = std::min(end * kMixBlock, args_.width);
      float *scores = draw_.scores.data() + first, *drafts = draft_scores_.data() + first;
      kernels().mix.write(&draft, 1, first, last, 0.0f, drafts, 0);
      kernels().mix.residual(scores, drafts, last - first, draw_.max, draw_.scale, log_mass_,
                             draw_.cutoff.score);
      kernels().mix.group_max(scores, last - first, draw_.group_maxima.data() + first / kMixGroup);
    });
    constexpr float kSmallest = std::numeric_limits<float>::min();
    const float highest = draw_.highest();
    if (!(highest >= kSmallest)) {  // lost to rounding: the target itself is as good
      score(mix);
      draw_.find_cutoff();
      return race(kResidualStream, false);
    }
    draw_.max = highest;
    draw_.cutoff = {kSmallest, args_.width};
    return race(kResidualStream, true);
  }

  int64_t race(MixStream stream, bool linear) {
    std::vector<MdkRace> found(threads_);
    for (MdkRace& none : found) none.token = -1;
    over_blocks(threads_, args_.blocks(), [&](int thread, int64_t begin, int64_t end) {
      found[thread] = draw_.pass_race(seed_, offset_, stream, linear, begin, end);
    });
    const MdkRace* best = nullptr;  // shares ascend with the thread: the first of equals wins
    for (const MdkRace& other : found)
      if (other.token >= 0 && (best == nullptr || other.key < best->key)) best = &other;
    return best == nullptr ? -1 : best->token;
  }

  const MixArgs& args_;
  const MixVerifyArgs& verify_;
  const int threads_;
  const bool greedy_, processed_;
  MixDraw draw_;
  std::vector<float> draft_scores_;
  float log_mass_ = 0.0f;
  uint64_t seed_ = 0, offset_ = 0;
  int64_t row_ = 0;
};

Fault check_drafts(const MixArgs& args, const MixVerifyArgs& verify, int64_t requests) {
  const int64_t most = verify.positions - 1;
  for (int64_t r = 0; r < requests; ++r) {
    const int64_t length = verify.draft_lengths[r];
    if (length < 0 || length > most) return {"draft_length", r, length};
    for (int64_t i = 0; i < length; ++i) {
      const int64_t id = verify.draft_ids[r * most + i];
      if (id < 0 || id >= args.width) return {"draft_id", r, i};
    }
  }
  return no_fault;
}

}  // namespace

Fault mix_verify(const MixArgs& args, const MixVerifyArgs& verify, int requested) {
  const int64_t requests = args.rows / verify.positions;
  if (Fault fault = check_mix_weights(args); fault.what) return fault;
  if (Fault fault = check_drafts(args, verify, requests); fault.what) return fault;
  MixArgs once = args;  // what one position per request costs decides over the threads
  once.rows = requests;
  const int threads = MixPlan(once, requested).threads;
  const bool split = requests < threads;
  std::atomic<int64_t> bad_row{std::numeric_limits<int64_t>::max()};
  const auto run = [&](Verifier& verifier, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t bad = verifier.request(r);
      int64_t seen = bad_row.load();
      while (bad >= 0 && bad < seen && !bad_row.compare_exchange_weak(seen, bad)) {
      }
    }
  };
  if (split) {
    Verifier verifier(args, verify, threads);
    run(verifier, 0, requests);
  } else {
    std::vector<Verifier> verifiers(threads, Verifier(args, verify, 1));
    parallel_rows(requests, threads, 1, [&](int thread, int64_t begin, int64_t end) {
      run(verifiers[thread], begin, end);
    });
  }
  if (bad_row.load() != std::numeric_limits<int64_t>::max())
    return {"undefined", bad_row.load() / verify.positions, bad_row.load() % verify.positions};
  return no_fault;
}

}  // namespace mdk
