#include "sparse_kl_driver.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "parallel.h"

namespace mdk {
namespace {

Fault check_offsets(const MdkSparseKL& a, int64_t nnz) {
  if (a.row_offsets[0] != 0) return {"first_offset", 0, a.row_offsets[0]};
  for (int64_t row = 0; row < a.rows; ++row)
    if (a.row_offsets[row + 1] < a.row_offsets[row])
      return {"descending_offsets", row, a.row_offsets[row + 1]};
  if (a.row_offsets[a.rows] != nnz) return {"last_offset", a.rows, a.row_offsets[a.rows]};
  return no_fault;
}

Fault check_ids(const MdkSparseKL& a, int64_t nnz) {
  const auto vocab = static_cast<uint64_t>(a.vocab);
  bool ok = true;  // branch-free, so that the common case vectorises
  for (int64_t i = 0; i < nnz; ++i)
    ok &= static_cast<uint64_t>(static_cast<int64_t>(a.token_ids[i])) < vocab;
  for (int64_t row = 0; !ok && row < a.rows; ++row)
    for (int64_t i = a.row_offsets[row]; i < a.row_offsets[row + 1]; ++i)
      if (static_cast<uint64_t>(static_cast<int64_t>(a.token_ids[i])) >= vocab)
        return {"token_id", row, a.token_ids[i]};
  return no_fault;
}

Fault check_labels(const MdkSparseKL& a) {
  for (int64_t row = 0; row < a.rows; ++row)
    if (a.labels[row] != a.ignore_index &&
        static_cast<uint64_t>(a.labels[row]) >= static_cast<uint64_t>(a.vocab))
      return {"label", row, a.labels[row]};
  return no_fault;
}

struct Scratch {
  std::vector<MdkSlot> table;
  std::unique_ptr<float, decltype(&std::free)> memory{nullptr, &std::free};
  MdkSparseKLScratch view;

  Scratch(int64_t longest_row, int64_t vocab, bool keeps_row) {
    constexpr int64_t slack = 64;  // a label and a full vector
    const int64_t capacity = longest_row + slack, blocks = vocab / 4096 + 1;
    const int64_t kept = keeps_row ? vocab + slack : 0;
    int64_t slots = 64;
    while (slots < 2 * capacity) slots *= 2;
    table.resize(slots, MdkSlot{0, 0, 0});
    // Whole lines, so that no vector lies across two; and not zeroed: the exponentials of a row are
    // most of it.
    constexpr int64_t line = 64 / sizeof(float);
    const auto lines = [](int64_t count) { return (count + line - 1) / line * line; };
    const int64_t total = 6 * lines(capacity) + lines(kept) + lines(blocks);
    memory.reset(static_cast<float*>(std::aligned_alloc(64, total * sizeof(float))));
    if (!memory) throw std::bad_alloc();
    float* at = memory.get();
    const auto take = [&](int64_t count) {
      at += lines(count);
      return at - lines(count);
    };
    view.table = table.data();
    view.table_mask = static_cast<uint32_t>(slots - 1);
    view.stamp = 0;
    view.ids = reinterpret_cast<int32_t*>(take(capacity));
    view.probs = take(capacity);
    view.logits = take(capacity);
    view.work = take(capacity);
    view.late_ids = reinterpret_cast<int32_t*>(take(capacity));
    view.late_work = take(capacity);
    view.kept = take(kept);
    view.references = take(blocks);
  }
};

double divisor(const MdkSparseKL& a, const SparseKLReduction& r) {
  if (!r.mean) return 1.0;
  int64_t count = a.labels ? 0 : a.rows;
  for (int64_t row = 0; a.labels && row < a.rows; ++row) count += a.labels[row] != a.ignore_index;
  return static_cast<double>(std::max<int64_t>(count, 1));
}

// A weight of 0 drops its term: 0 * inf is NaN.
void write_totals(const MdkSparseKL& a, const SparseKLReduction& r, double divide) {
  double kl = 0.0, ce = 0.0;
  for (int64_t row = 0; row < a.rows; ++row) {
    kl += a.kl[row];
    ce += a.ce[row];
  }
  kl /= divide;
  ce /= divide;
  *r.kl = static_cast<float>(kl);
  *r.ce = static_cast<float>(ce);
  const double w = r.kl_weight;
  *r.loss = static_cast<float>(w == 0.0 ? ce : w == 1.0 ? kl : w * kl + (1.0 - w) * ce);
}

}  // namespace

Fault sparse_kl(MdkSparseKL args, const SparseKLReduction& reduction, int64_t nnz, int threads) {
  int64_t longest = 0;
  if (args.row_offsets) {
    if (Fault fault = check_offsets(args, nnz); fault.what) return fault;
    if (Fault fault = check_ids(args, nnz); fault.what) return fault;
    for (int64_t row = 0; row < args.rows; ++row)
      longest = std::max(longest, args.row_offsets[row + 1] - args.row_offsets[row]);
  }
  if (args.labels)
    if (Fault fault = check_labels(args); fault.what) return fault;

  const double divide = divisor(args, reduction);
  std::vector<float> coefs;
  if (args.grad && !args.kl_coef) {
    coefs.assign(args.rows, static_cast<float>(reduction.kl_weight / divide));
    coefs.resize(2 * args.rows, static_cast<float>((1.0 - reduction.kl_weight) / divide));
    args.kl_coef = coefs.data();
    args.ce_coef = coefs.data() + args.rows;
  }

  const auto body = kernels().sparse_kl;
  // Contiguous runs keep the next-row prefetch useful; eight per thread even out the end.
  const int64_t chunk = std::max<int64_t>(1, args.rows / (8 * std::max(threads, 1)));
  const bool keeps = args.grad && !args.grad_only && args.dtype != MDK_F32;
  const int workers = usable_threads((args.rows + chunk - 1) / chunk, threads);
  std::vector<Scratch> scratch;
  scratch.reserve(workers);  // `view` points into its own vectors: elements must not move
  for (int i = 0; i < workers; ++i) scratch.emplace_back(longest, args.vocab, keeps);
  parallel_rows(args.rows, threads, chunk, [&](int thread, int64_t begin, int64_t end) {
    body(&args, &scratch[thread].view, begin, end);
  });
  if (reduction.loss) write_totals(args, reduction, divide);
  return no_fault;
}

}  // namespace mdk
