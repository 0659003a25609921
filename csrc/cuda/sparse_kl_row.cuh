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
  const float* kl_coef;  // (rows) d(total)/d(kl_row)
  const float* ce_coef;
  int chunk;  // 16-byte blocks of a row in shared memory at a time
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
  int64_t vectors, begin, end;  // 16-byte blocks

  const SparseKL* a;
  int64_t first_entry, last_entry;  // of the targets
  int64_t label;                    // -1: none

  Shared* shared;
  T* values;  // the chunk
  unsigned *seen, *repeated;

  __device__ bool edge(int64_t v) const { return v == 0 || v == vectors - 1; }
  __device__ int64_t column(int64_t v) const { return v * kPerVec<T> - shift; }
  __device__ int64_t chunk_start(int c) const { return begin + static_cast<int64_t>(c) * a->chunk; }
  __device__ int chunk_size(int c) const {
    const int64_t left = end - chunk_start(c);
    return left <= 0 ? 0 : left < a->chunk ? static_cast<int>(left) : a->chunk;
  }
  // Index of a column within chunk c, or -1.
  __device__ int slot(int64_t id, int c) const {
    const int64_t at = id + shift - chunk_start(c) * kPerVec<T>;
    return at >= 0 && at < static_cast<int64_t>(chunk_size(c)) * kPerVec<T> ? static_cast<int>(at)
                                                                            : -1;
  }
};

__device__ __forceinline__ bool bit(const unsigned* bitmap, int at) {
  return (bitmap[at >> 5] >> (at & 31)) & 1u;
}

// Starts loading chunk c. A thread loads what it will sum up and later replace, so no barrier is
// needed in between. Elements outside the row become -inf.
template <class T>
__device__ __forceinline__ void load_chunk(const Row<T>& r, int c) {
  constexpr int kPer = kPerVec<T>;
  const int64_t start = r.chunk_start(c);
  const int size = r.chunk_size(c);
  const int rounds = (size + thread_count() - 1) / thread_count();
  const int per_group = (rounds + kGroups - 1) / kGroups;
  const T* aligned = r.x - r.shift;
  for (int g = 0; g < kGroups; ++g) {
    for (int i = g * per_group; i < (g + 1) * per_group; ++i) {
      const int v = i * thread_count() + thread_index();
      if (v >= size) break;
      const int64_t whole = start + v;
      if (!r.edge(whole)) {
        copy_async16(r.values + v * kPer, aligned + whole * kPer);
        continue;
      }
      for (int e = 0; e < kPer; ++e) {
        const int64_t column = r.column(whole) + e;
        const bool inside = column >= 0 && column < r.vocab;
        r.values[v * kPer + e] = inside ? r.x[column] : from_float<T>(-INFINITY);
      }
    }
    copy_async_commit();
  }
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
  float scale;            // dz = scale * exp(z - max) - corrections
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

// Chunk c of dz from the logits in shared memory.
template <class T>
__device__ __forceinline__ void write_chunk(const Row<T>& r, int c, const Terms& t) {
  constexpr int kPer = kPerVec<T>;
  const int64_t start = r.chunk_start(c);
  const int size = r.chunk_size(c);
  const bool aligned = misalignment(r.grad) == r.shift;
  // NaN or infinite logits, all of them -inf, or a target that names no token
  const bool poisoned = t.bad || !(fabsf(t.scale) < INFINITY);
  for (int v = thread_index(); v < size; v += thread_count()) {
    float z[kPer];
    unpack<T>(load16(r.values + v * kPer), z);
    const unsigned finished = (r.seen[(v * kPer) >> 5] >> ((v * kPer) & 31)) & ((1u << kPer) - 1u);
#pragma unroll
    for (int e = 0; e < kPer; ++e) {
      const float dense = exp_from(z[e], t.max) * t.scale;
      z[e] = poisoned ? NAN : (finished >> e) & 1u ? z[e] : dense;
    }
    const int64_t whole = start + v, column = r.column(whole);
    const Vec16 out = pack<T>(z);
    if (aligned && !r.edge(whole)) {
      store16_once(r.grad + column, out);
      continue;
    }
#pragma unroll
    for (int e = 0; e < kPer; ++e)
      if (column + e >= 0 && column + e < r.vocab) r.grad[column + e] = from_float<T>(z[e]);
  }
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
