// sparse_kl, the parts of a visit: loading a chunk of a row, summing it, marking and correcting the
// targets in it, writing the gradient. The order of visits is in sparse_kl.cu, the derivation in
// mdkernels/ops/sparse_kl/README.md.
#pragma once
#include "online_softmax.cuh"

namespace mdk {
namespace {

constexpr int kMostThreads = 512;
constexpr int kGroups = 4;  // a chunk arrives in this many parts, worked on as they come

struct SparseKL {
  const void* logits;  // (rows, vocab), unit stride within a row
  int64_t row_stride;  // elements
  int64_t rows, vocab;
  const int64_t* row_offsets;  // (rows + 1), or null: no targets
  const int32_t* token_ids;
  const void* probs;
  int probs_dtype;
  int64_t nnz;
  const int64_t* labels;  // (rows), or null
  int64_t ignore_index;
  float* kl;    // (rows) nats, or null
  float* ce;    // (rows) nats, or null
  double* lse;  // (rows) nats: written unless lse_known (may be null then), else read
  bool lse_known;
  void* grad;  // null: losses only. May be the logits themselves.
  int64_t grad_stride;
  const float* kl_coef;  // d(total)/d(kl_row)
  const float* ce_coef;
  int64_t coef_stride;  // 0: one for all rows
  int chunk;            // 16-byte blocks of a row in shared memory at a time
};

struct Shared {
  RowSum ranks[kMostBlocks];
  double kl_ranks[kMostBlocks];
  double kl_warps[kMostThreads / kWarp];
  double mass_warps[kMostThreads / kWarp];
  MaxSum warps[kMostThreads / kWarp];
  unsigned bad_warps[kMostThreads / kWarp];
};

// 32-bit words of a bit per element of a chunk.
template <class T>
__host__ __device__ __forceinline__ int bitmap_words(int chunk) {
  return (chunk * kPerVec<T> + 31) / 32;
}

// One row as a block sees it. The row is numbered in 16-byte blocks of memory, see misalignment();
// this block of threads owns [begin, end) of them, in chunks.
template <class T>
struct Row {
  const T* x;
  T* grad;
  int64_t vocab;
  int shift;
  int vectors, begin, end;  // 16-byte blocks

  const SparseKL* a;
  int64_t first_entry, last_entry;  // of the targets
  int64_t label;                    // -1: none

  Shared* shared;
  T* values;  // the chunk
  unsigned *seen, *repeated;

  __device__ int64_t column(int v) const { return static_cast<int64_t>(v) * kPerVec<T> - shift; }
  __device__ int chunk_start(int c) const { return begin + c * a->chunk; }
  __device__ int chunk_size(int c) const {
    const int left = end - chunk_start(c);
    return left <= 0 ? 0 : left < a->chunk ? left : a->chunk;
  }
  // Index of a column within chunk c, or -1.
  __device__ int slot(int64_t id, int c) const {
    const int64_t at = id + shift - static_cast<int64_t>(chunk_start(c)) * kPerVec<T>;
    return at >= 0 && at < static_cast<int64_t>(chunk_size(c)) * kPerVec<T> ? static_cast<int>(at)
                                                                            : -1;
  }
};

__device__ __forceinline__ bool bit(const unsigned* bitmap, int at) {
  return (bitmap[at >> 5] >> (at & 31)) & 1u;
}

// The 16-byte blocks of a chunk, numbered from its start, that lie wholly inside the row. The
// others are the first and the last of the row.
struct Inside {
  int begin, end;
};
template <class T>
__device__ __forceinline__ Inside inside(const Row<T>& r, int c) {
  const int start = r.chunk_start(c), last = r.vectors - 1 - start;
  const int size = r.chunk_size(c), begin = start == 0 ? 1 : 0;
  const int end = last < size ? last : size;
  return {begin, end < begin ? begin : end};
}

// Calls body(block) for the other blocks of chunk c that this thread owns. Out of the loops over
// the chunk, whose time is that of their instructions.
template <class T, class F>
__device__ __forceinline__ void each_edge(const Row<T>& r, int c, const F& body) {
  const int start = r.chunk_start(c), last = r.vectors - 1 - start;
  const int size = r.chunk_size(c);
#pragma unroll 1
  for (int side = 0; side < 2; ++side) {
    const int v = side == 0 ? -start : last;
    if (v < 0 || v >= size || (side == 1 && last == -start)) continue;
    if (v % thread_count() == thread_index()) body(v);
  }
}

// Starts loading chunk c. A thread loads what it will sum up and later replace, so no barrier is
// needed in between. Elements outside the row become -inf.
template <class T>
__device__ __forceinline__ void load_chunk(const Row<T>& r, int c) {
  constexpr int kPer = kPerVec<T>;
  const int threads = thread_count(), rounds = (r.chunk_size(c) + threads - 1) / threads;
  const int per_group = (rounds + kGroups - 1) / kGroups;
  const Inside in = inside(r, c);
  const unsigned whole = static_cast<unsigned>(in.end - in.begin);
  int v = thread_index();
  const T* from = r.x + r.column(r.chunk_start(c) + v);
#pragma unroll 1
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < per_group; ++i) {
      if (static_cast<unsigned>(v - in.begin) < whole) copy_async16(r.values + v * kPer, from);
      v += threads;
      from += threads * kPer;
    }
    copy_async_commit();
  }
  each_edge(r, c, [&](int edge) {
    for (int e = 0; e < kPer; ++e) {
      const int64_t column = r.column(r.chunk_start(c) + edge) + e;
      const bool there = column >= 0 && column < r.vocab;
      r.values[edge * kPer + e] = there ? r.x[column] : from_float<T>(-INFINITY);
    }
  });
}

template <class T>
__device__ __forceinline__ void sum_group(const Row<T>& r, int size, int begin, int end,
                                          MaxSum& acc) {
  constexpr int kPer = kPerVec<T>, kTogether = 16 / kPer;
  float z[kTogether * kPer];
  int i = begin;
  for (; i + kTogether <= end; i += kTogether) {
    if ((i + kTogether - 1) * thread_count() + thread_index() >= size) break;
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
      unpack<T>(load16(r.values + ((i + k) * thread_count() + thread_index()) * kPer),
                z + k * kPer);
    accumulate<kTogether * kPer>(acc, z);
  }
  for (; i < end; ++i) {
    const int v = i * thread_count() + thread_index();
    if (v >= size) break;
    unpack<T>(load16(r.values + v * kPer), z);
    accumulate<kPer>(acc, z);
  }
}

// This thread's part of the chunk, as it arrives.
template <class T>
__device__ __forceinline__ void sum_chunk(const Row<T>& r, int c, MaxSum& acc) {
  const int size = r.chunk_size(c);
  const int rounds = (size + thread_count() - 1) / thread_count();
  const int per_group = (rounds + kGroups - 1) / kGroups;
  static_assert(kGroups == 4);
#pragma unroll 1
  for (int g = 0; g < kGroups; ++g) {
    if (g == 0)
      copy_async_wait<3>();
    else if (g == 1)
      copy_async_wait<2>();
    else if (g == 2)
      copy_async_wait<1>();
    else
      copy_async_wait<0>();
    sum_group(r, size, g * per_group, (g + 1) * per_group, acc);
  }
}

struct Found {
  double mass = 0.0;
  bool bad = false;
};

// Marks the target ids that lie in chunk c, and those that occur again. Sums this thread's part of
// the mass of the whole row. Barriers are due before (the bitmaps are in use) and after.
template <class T>
__device__ __forceinline__ Found mark_targets(const Row<T>& r, int c) {
  const int words = bitmap_words<T>(r.chunk_size(c));
  for (int i = thread_index(); i < words; i += thread_count()) r.seen[i] = r.repeated[i] = 0u;
  block_sync();
  Found found;
  for (int64_t i = r.first_entry + thread_index(); i < r.last_entry; i += thread_count()) {
    const int32_t id = r.a->token_ids[i];
    found.mass += load_as_float(r.a->probs, r.a->probs_dtype, i);
    found.bad |= id < 0 || id >= r.vocab;
    const int at = r.slot(id, c);
    if (at < 0) continue;
    const unsigned mine = 1u << (at & 31);
    if (atomic_or(r.seen + (at >> 5), mine) & mine) atomic_or(r.repeated + (at >> 5), mine);
  }
  return found;
}

struct Terms {
  float max;
  double log_normalizer;  // lse - max
  float scale;            // dz = scale * exp(z - max) - corrections; NaN: the row has no gradient
  float kl_coef, ce_coef;
  bool bad;
};

// The total probability of the id of entry i, or -1 if an earlier entry has the same id and
// computes it. In the order of the entries.
template <class T>
__device__ bool total_probability(const Row<T>& r, int64_t i, int32_t id, float* total) {
  float p = 0.0f;
  for (int64_t j = r.first_entry; j < r.last_entry; ++j) {
    if (r.a->token_ids[j] != id) continue;
    if (j < i) return false;
    p += load_as_float(r.a->probs, r.a->probs_dtype, j);
  }
  *total = p;
  return true;
}

__device__ __forceinline__ double minus_logprob(const Terms& t, float z) {
  return t.log_normalizer - (static_cast<double>(z) - static_cast<double>(t.max));
}

template <class T>
__device__ __forceinline__ void write_ce(const Row<T>& r, const Terms& t, int64_t row, float gold) {
  if (r.a->ce != nullptr && !t.bad) r.a->ce[row] = static_cast<float>(minus_logprob(t, gold));
}

// The loss terms of the targets in chunk c. With a gradient, their logits in
// shared memory are replaced by the finished entries of dz, in fp32 from the logit and rounded
// once; `seen` has a bit for each. Returns this thread's part of kl.
template <class T>
__device__ __forceinline__ double correct_targets(const Row<T>& r, int c, const Terms& t,
                                                  int64_t row) {
  double kl = 0.0;
  const auto dense = [&](float z) { return exp_from(z, t.max) * t.scale; };
  for (int64_t i = r.first_entry + thread_index(); i < r.last_entry; i += thread_count()) {
    const int32_t id = r.a->token_ids[i];
    const int at = r.slot(id, c);
    if (at < 0) continue;
    float p;
    if (!bit(r.repeated, at))
      p = load_as_float(r.a->probs, r.a->probs_dtype, i);
    else if (!total_probability(r, i, id, &p))
      continue;
    const float z = to_float(r.values[at]);
    if (p > 0.0f)
      kl += static_cast<double>(p) * (log(static_cast<double>(p)) + minus_logprob(t, z));
    else if (!(p == 0.0f))
      kl = NAN;  // a negative or NaN probability
    if (id == r.label) write_ce(r, t, row, z);
    if (r.grad == nullptr) continue;
    const float target = t.kl_coef * p;
    r.values[at] = from_float<T>(dense(z) - target - (id == r.label ? t.ce_coef : 0.0f));
  }
  return kl;
}

// The label, if it lies in chunk c and is nobody's target: a target of probability 0.
template <class T>
__device__ __forceinline__ void correct_label(const Row<T>& r, int c, const Terms& t, int64_t row) {
  if (r.label < 0 || thread_index() != 0) return;
  const int at = r.slot(r.label, c);
  if (at < 0 || bit(r.seen, at)) return;
  const float z = to_float(r.values[at]);
  write_ce(r, t, row, z);
  if (r.grad == nullptr) return;
  atomic_or(r.seen + (at >> 5), 1u << (at & 31));
  r.values[at] = from_float<T>(exp_from(z, t.max) * t.scale - t.ce_coef);
}

// From each thread's part of kl. Ahead of the stores of the gradient, because those of a cluster
// would have to arrive in memory before its barrier opens. Also orders the corrections before what
// follows.
template <class T>
__device__ __forceinline__ void write_losses(const Row<T>& r, const Terms& t, int64_t row,
                                             double kl) {
  kl = warp_add(kl);
  if (lane_index() == 0) r.shared->kl_warps[warp_index()] = kl;
  block_sync();
  if (thread_index() == 0) {
    kl = 0.0;
    for (int w = 0; w < warp_count(); ++w) kl += r.shared->kl_warps[w];
    *cluster_shared(r.shared->kl_ranks + cluster_rank(), 0) = kl;
  }
  if (cluster_size() > 1) cluster_sync();
  if (cluster_rank() != 0 || thread_index() != 0) return;
  kl = 0.0;
  for (int k = 0; k < cluster_size(); ++k) kl += r.shared->kl_ranks[k];
  if (r.a->kl != nullptr) r.a->kl[row] = t.bad ? NAN : static_cast<float>(kl);
  if (r.a->ce != nullptr && (t.bad || r.label < 0)) r.a->ce[row] = t.bad ? NAN : 0.0f;
  if (r.a->lse != nullptr && !r.a->lse_known)
    r.a->lse[row] = t.bad ? NAN : static_cast<double>(t.max) + t.log_normalizer;
}

// Chunk c of dz from the logits in shared memory.
template <class T>
__device__ __forceinline__ void write_chunk(const Row<T>& r, int c, const Terms& t) {
  constexpr int kPer = kPerVec<T>;
  const int size = r.chunk_size(c), threads = thread_count();
  const int64_t first = r.column(r.chunk_start(c));
  const auto gradient = [&](int v, float* z) {
    unpack<T>(load16(r.values + v * kPer), z);
    const unsigned finished = r.seen[(v * kPer) >> 5] >> ((v * kPer) & 31);
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      const float dense = exp_from(z[e], t.max) * t.scale;
      z[e] = (finished >> e) & 1u ? z[e] : dense;
    }
  };
  const auto by_element = [&](int v) {
    float z[kPer];
    gradient(v, z);
    const int64_t column = first + static_cast<int64_t>(v) * kPer;
#pragma unroll
    for (int e = 0; e < kPer; ++e)
      if (column + e >= 0 && column + e < r.vocab) r.grad[column + e] = from_float<T>(z[e]);
  };
  if (misalignment(r.grad) != r.shift) {
    for (int v = thread_index(); v < size; v += threads) by_element(v);
    return;
  }
  const Inside in = inside(r, c);
  T* out = r.grad + first;
  for (int v = thread_index() + (thread_index() < in.begin ? threads : 0); v < in.end;
       v += threads) {
    float z[kPer];
    gradient(v, z);
    store16_once(out + v * kPer, pack<T>(z));
  }
  each_edge(r, c, by_element);
}

template <class T>
__device__ __forceinline__ void write_zeros(T* out, int64_t vocab) {
  constexpr int kPer = kPerVec<T>;
  const int shift = misalignment(out);
  const int64_t vectors = (vocab + shift + kPer - 1) / kPer;
  const int64_t step = static_cast<int64_t>(thread_count()) * cluster_size();
  for (int64_t v = static_cast<int64_t>(cluster_rank()) * thread_count() + thread_index();
       v < vectors; v += step) {
    const int64_t column = v * kPer - shift;
    if (v != 0 && v != vectors - 1) {
      store16_once(out + column, Vec16{{0u, 0u, 0u, 0u}});
      continue;
    }
    for (int e = 0; e < kPer; ++e)
      if (column + e >= 0 && column + e < vocab) out[column + e] = from_float<T>(0.0f);
  }
}

// What all threads learn from each other about the row: maximum and sum, mass, bad ids. Also orders
// the logits and bitmaps in shared memory among them.
template <class T>
__device__ __forceinline__ RowSum exchange(const Row<T>& r, MaxSum acc, Found* found) {
  found->mass = warp_add(found->mass);
  const unsigned bad = ballot(found->bad);
  if (lane_index() == 0) {
    r.shared->mass_warps[warp_index()] = found->mass;
    r.shared->bad_warps[warp_index()] = bad;
  }
  const RowSum row = block_combine(acc, r.shared->warps);
  const bool mine = lane_index() < warp_count();
  found->mass = warp_add(mine ? r.shared->mass_warps[lane_index()] : 0.0);
  found->bad = ballot(mine && r.shared->bad_warps[lane_index()] != 0u) != 0u;
  return cluster_combine(row, r.shared->ranks);
}

}  // namespace
}  // namespace mdk
