// sparse_kl: loss, gradient, or both in one visit of the logits. Derivation, shared memory layout
// and bytes moved: "CUDA" in mdkernels/ops/sparse_kl/README.md, whose names are used here.
#include "launch.h"
#include "sparse_kl_row.cuh"

namespace mdk {
namespace {

template <class T>
__global__ void __launch_bounds__(kMostThreads, 2) sparse_kl_kernel(const SparseKL a) {
  constexpr int kPer = kPerVec<T>;
  Row<T> r;
  r.a = &a;
  r.vocab = a.vocab;
  r.shared = reinterpret_cast<Shared*>(shared_memory());
  r.values = reinterpret_cast<T*>(shared_memory() + (sizeof(Shared) + 15) / 16 * 16);
  r.seen = reinterpret_cast<unsigned*>(r.values + static_cast<int64_t>(a.chunk) * kPer);
  r.repeated = r.seen + bitmap_words<T>(a.chunk);
  const int64_t step = block_count() / cluster_size();
  bool met = cluster_size() == 1;  // the blocks of the cluster have started
  for (int64_t row = block_index() / cluster_size(); row < a.rows; row += step) {
    const bool leader = cluster_rank() == 0 && thread_index() == 0;
    r.x = static_cast<const T*>(a.logits) + row * a.row_stride;
    r.grad = a.grad == nullptr ? nullptr : static_cast<T*>(a.grad) + row * a.grad_stride;
    // Read together, used below: one after the other, each would keep the block waiting.
    r.first_entry = a.row_offsets == nullptr ? 0 : a.row_offsets[row];
    r.last_entry = a.row_offsets == nullptr ? 0 : a.row_offsets[row + 1];
    const double saved = a.lse_known ? a.lse[row] : 0.0;
    Terms t;
    t.kl_coef = r.grad == nullptr ? 0.0f : a.kl_coef[row * a.coef_stride];
    t.ce_coef = r.grad == nullptr ? 0.0f : a.ce_coef[row * a.coef_stride];
    r.label = a.labels == nullptr ? -1 : a.labels[row];
    if (a.labels != nullptr && r.label == a.ignore_index) {
      if (r.grad != nullptr) write_zeros(r.grad, a.vocab);
      if (leader && a.kl != nullptr) a.kl[row] = 0.0f;
      if (leader && a.ce != nullptr) a.ce[row] = 0.0f;
      if (leader && a.lse != nullptr && !a.lse_known) a.lse[row] = 0.0;
      continue;
    }
    bool bad = a.labels != nullptr && (r.label < 0 || r.label >= a.vocab);
    if (bad) r.label = -1;
    if (r.first_entry < 0 || r.last_entry < r.first_entry || r.last_entry > a.nnz) {
      bad = true;
      r.first_entry = r.last_entry = 0;
    }
    r.shift = misalignment(r.x);
    r.vectors = static_cast<int>((a.vocab + r.shift + kPer - 1) / kPer);
    const int per_block = (r.vectors + cluster_size() - 1) / cluster_size();
    r.begin = cluster_rank() * per_block;
    r.end = r.begin + per_block < r.vectors ? r.begin + per_block : r.vectors;
    const int last = (per_block - 1) / a.chunk;

    // Beyond 1e8 (a row of the lowest finite logits) lse = max + log(sum) has lost the second term.
    const bool known = a.lse_known && fabs(saved) < 1e8;
    MaxSum acc;
    Found found;
    for (int c = known ? last : 0; c <= last; ++c) {
      load_chunk(r, c);
      if (c == last) {
        if (!met) cluster_sync();
        met = true;
        found = mark_targets(r, c);
      }
      if (!known) sum_chunk(r, c, acc);
    }
    copy_async_wait<0>();
    found.bad |= bad;
    const RowSum sum = exchange(r, acc, &found);

    t.bad = found.bad;
    t.max = known ? static_cast<float>(saved) : sum.max;
    t.log_normalizer = known ? saved - static_cast<double>(t.max) : log(sum.sum);
    if (r.label < 0) t.ce_coef = 0.0f;
    const double weight = static_cast<double>(t.kl_coef) * static_cast<float>(found.mass) +
                          static_cast<double>(t.ce_coef);
    t.scale = static_cast<float>(known ? weight * exp(-t.log_normalizer) : weight / sum.sum);
    // NaN or infinite logits, all of them -inf, or a target that names no token
    if (t.bad || !(fabsf(t.scale) < INFINITY)) t.scale = NAN;

    double kl = 0.0;
    for (int c = last; c >= 0; --c) {
      if (c != last) {
        block_sync();  // the chunk before and its bitmaps are in use by everybody until here
        load_chunk(r, c);
        mark_targets(r, c);
        copy_async_wait<0>();
        block_sync();
      }
      correct_label(r, c, t, row);
      kl += correct_targets(r, c, t, row);
      if (c == 0) break;
      block_sync();
      if (r.grad != nullptr) write_chunk(r, c, t);
    }
    write_losses(r, t, row, kl);
    if (r.grad != nullptr) write_chunk(r, 0, t);
    if (row + step < a.rows) everybody_sync();  // the next row reuses the shared memory
  }
}

// Bytes of shared memory for chunks of that many 16-byte blocks.
template <class T>
int64_t shared_bytes(int64_t chunk) {
  const int64_t words = (chunk * kPerVec<T> + 31) / 32;
  return static_cast<int64_t>((sizeof(Shared) + 15) / 16 * 16) + chunk * 16 + 2 * 4 * words;
}

// The longest chunk that fits.
template <class T>
int64_t chunk_within(int64_t bytes) {
  int64_t chunk = bytes / 16;
  while (shared_bytes<T>(chunk) > bytes) chunk -= 1 + (shared_bytes<T>(chunk) - bytes) / 32;
  return chunk;
}

// A row should stay in shared memory between its two visits, in a block or in those of a cluster,
// best so that two blocks share a multiprocessor: one loads while the other computes. Where it
// does not fit, it is read again chunk by chunk.
template <class T>
void plan(SparseKL* a, Grid* grid) {
  const Device& device = current_device();
  const int64_t half = device.shared_per_multiprocessor / 2 - kSharedReserved;
  const int64_t vectors = (a->vocab + kPerVec<T> - 1) / kPerVec<T> + 1;
  const auto share = [vectors](int cluster) { return (vectors + cluster - 1) / cluster; };
  const int most = device.capability >= 90 ? kMostBlocks : 1;
  int cluster = grid->cluster;
  // A backward pass that knows the log-sum-exp visits once.
  if (a->lse_known && cluster == 0) cluster = 1;
  for (int size = 1; cluster == 0 && size <= most; size *= 2)
    if (shared_bytes<T>(share(size)) <= half) cluster = size;
  for (int size = 1; cluster == 0 && size <= most; size *= 2)
    if (shared_bytes<T>(share(size)) <= device.shared_per_block) cluster = size;
  if (cluster == 0) cluster = most;
  int64_t chunk = a->chunk > 0 ? a->chunk : share(cluster);
  const int64_t room = !a->lse_known && shared_bytes<T>(chunk) <= device.shared_per_block
                           ? device.shared_per_block
                           : half;
  const int64_t fits = chunk_within<T>(room);
  if (chunk > share(cluster)) chunk = share(cluster);
  if (chunk > fits) chunk = fits;
  a->chunk = static_cast<int>(chunk);
  grid->cluster = cluster;
  if (grid->threads == 0) {
    const int64_t wanted = (chunk / 4 + kWarp - 1) / kWarp * kWarp;
    grid->threads = static_cast<int>(wanted < 64             ? 64
                                     : wanted > kMostThreads ? kMostThreads
                                                             : wanted);
  }
  const int64_t rows = kMostGridBlocks / cluster;
  grid->blocks = (a->rows < rows ? a->rows : rows) * cluster;
  grid->shared_bytes = static_cast<size_t>(shared_bytes<T>(chunk));
}

template <class T>
void run(SparseKL a, Grid grid) {
  plan<T>(&a, &grid);
  launch<sparse_kl_kernel<T>>(grid, a);
}

}  // namespace

void sparse_kl(Arguments& in) {
  SparseKL a;
  a.logits = in.pointer<void>();
  a.row_stride = in.integer();
  a.rows = in.integer();
  a.vocab = in.integer();
  const int64_t dtype = in.integer();
  a.row_offsets = in.pointer<int64_t>();
  a.token_ids = in.pointer<int32_t>();
  a.probs = in.pointer<void>();
  a.probs_dtype = static_cast<int>(in.integer());
  a.nnz = in.integer();
  a.labels = in.pointer<int64_t>();
  a.ignore_index = in.integer();
  a.kl = in.pointer<float>();
  a.ce = in.pointer<float>();
  a.lse = in.pointer<double>();
  a.lse_known = in.integer() != 0;
  a.grad = in.pointer<void>();
  a.grad_stride = in.integer();
  a.kl_coef = in.pointer<float>();
  a.ce_coef = in.pointer<float>();
  a.coef_stride = in.integer();
  Grid grid;
  grid.threads = static_cast<int>(in.integer());
  grid.cluster = static_cast<int>(in.integer());
  a.chunk = static_cast<int>(in.integer());
  in.done();
  grid.stream = in.stream;
  if (a.rows == 0) return;
  if (dtype == kF32)
    run<float>(a, grid);
  else if (dtype == kBF16)
    run<bf16>(a, grid);
  else
    run<f16>(a, grid);
}

}  // namespace mdk
