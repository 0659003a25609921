// What the mixture operators share: weights, the normaliser of every model in one read, and the
// best candidate of a row. Derivation: mdkernels/ops/logit_mix/README.md.
//
// A row belongs to a cluster of blocks. It is summed up in pieces, one or more per block: per
// thread, then in a warp, a block and over the pieces, always in the same order. Their number and
// that of the threads depend on the width of a row alone, so a result does not depend on the batch
// it is in.
#pragma once
#include "launch.h"
#include "online_softmax.cuh"

namespace mdk {

constexpr int kMostModels = 16;
constexpr int kMixThreads = 320;  // at most: three blocks leave a thread 64 registers
constexpr int kMixWarps = kMixThreads / kWarp;
constexpr double kWeightSlack = 1e-6;  // as WEIGHT_SLACK of arguments.py

struct MixModel {
  const void* x;  // (rows, width), unit stride within a row
  int64_t stride, width;
  int dtype;
  float scale;   // what the logits are multiplied by
  float weight;  // unless there are row weights
};

struct MixArgs {
  int64_t rows, width;  // of the mixture: that of the widest model
  int count;            // models, base first
  MixModel models[kMostModels];
  const float* row_weights;  // (rows, count - 1), or null
  int64_t weight_stride, weight_step;

  static MixArgs read(Arguments& in) {
    MixArgs a = {};
    a.rows = in.integer();
    a.width = in.integer();
    a.row_weights = in.pointer<const float>();
    a.weight_stride = in.integer();
    a.weight_step = in.integer();
    a.count = static_cast<int>(in.integer());
    for (int k = 0; k < a.count && k < kMostModels; ++k) {
      MixModel& m = a.models[k];
      m.x = in.pointer<const void>();
      m.stride = in.integer();
      m.width = in.integer();
      m.dtype = static_cast<int>(in.integer());
      m.scale = static_cast<float>(in.real());
      m.weight = static_cast<float>(in.real());
    }
    return a;
  }
};

// A model at a row: log weight + log_softmax(x scale) = (x - max) scale + offset
struct MixTerm {
  int64_t start;  // of the row, in elements
  float max, scale, offset, log_sum;
  bool live;  // has a positive weight
};

// The best of some candidates: the least key, of equal ones the least id.
template <class K>
struct Best {
  K key;
  int id;  // -1: none
};
template <class K>
__device__ __forceinline__ Best<K> better(Best<K> a, Best<K> b) {
  if (a.id < 0) return b;
  if (b.id < 0) return a;
  return b.key < a.key || (b.key == a.key && b.id < a.id) ? b : a;
}

using WarpSums = MaxSum[kMostModels][kMixWarps];

struct MixShared {
  double best_keys[kMixWarps], rank_keys[2][kMostBlocks];
  RowSum pieces[kMostModels][kMostBlocks];
  WarpSums warps;
  MixTerm terms[kMostModels];
  float weights[kMostModels];
  int best_ids[kMixWarps], rank_ids[2][kMostBlocks];
  int weights_valid, sum_valid[kMostModels];
};

__device__ __forceinline__ MaxSum merge(MaxSum a, MaxSum b, float slope) {
  MaxSum c;
  c.max = fmaxf(a.max, b.max);
  c.sum = a.sum * exp2_fast((a.max - c.max) * slope) + b.sum * exp2_fast((b.max - c.max) * slope);
  return c;
}

__device__ __forceinline__ MaxSum warp_merge(MaxSum mine, float slope) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    MaxSum other;
    other.max = shuffle_xor(mine.max, mask);
    other.sum = shuffle_xor(mine.sum, mask);
    mine = merge(mine, other, slope);
  }
  return mine;
}

template <class T>
__device__ __forceinline__ Vec16 all_minus_infinity() {
  float x[kPerVec<T>];
#pragma unroll
  for (int i = 0; i < kPerVec<T>; ++i) x[i] = -INFINITY;
  return pack<T>(x);
}

template <int kCount>
__device__ __forceinline__ void add_scaled(MaxSum& acc, const float* x, float slope) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmaxf(top, x[i]);
  const float max = fmaxf(acc.max, top);
  float even = 0.0f, odd = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) (i % 2 ? odd : even) += exp2_fast((x[i] - max) * slope);
  acc.sum = acc.sum * exp2_fast((acc.max - max) * slope) + (even + odd);
  acc.max = max;
}

__device__ __forceinline__ const void* row_of(const MixModel& m, int64_t row) {
  return static_cast<const char*>(m.x) + row * m.stride * (m.dtype == kF32 ? 4 : 2);
}

// A contiguous share of a row in 16-byte blocks of memory, see misalignment().
struct Piece {
  const char* from;  // aligned
  int begin;         // blocks of the row before it
  int size, whole;   // its blocks, those without the last one of the row; negative behind the end
};
__device__ __forceinline__ Piece piece_of(const MixModel& m, int64_t row, int piece, int pieces) {
  const auto* x = static_cast<const char*>(row_of(m, row));
  const int before = static_cast<int>(reinterpret_cast<uintptr_t>(x) & 15u);
  const int64_t bytes = m.width * (m.dtype == kF32 ? 4 : 2);
  const int vectors = static_cast<int>((bytes + before + 15) / 16);
  const int share = (vectors + pieces - 1) / pieces;
  Piece p;
  p.begin = piece * share;
  p.from = x - before + static_cast<int64_t>(p.begin) * 16;
  const int left = vectors - p.begin;
  p.size = left < share ? left : share;
  p.whole = p.size < left ? p.size : p.size - 1;
  return p;
}

__device__ __forceinline__ void prefetch_piece(const Piece& p) {
  const int first = p.begin == 0 ? 1 : 0;  // partly outside the row
  if (p.whole > first) prefetch_blocks(p.from + first * 16, p.whole - first);
}

// This thread's part of a piece.
template <class T>
__device__ MaxSum mix_thread_sum(const T* x, int64_t width, float slope, const Piece& p) {
  // kAtOnce 16-byte blocks share a rescaling exponential, kLoads of them are on their way.
  constexpr int kPer = kPerVec<T>, kAtOnce = 16 / kPer, kLoads = 4;
  const int shift = misalignment(x), whole = p.whole;
  const T* from = reinterpret_cast<const T*>(p.from);
  MaxSum acc;
  float values[kAtOnce * kPer];
  const auto edge = [&](int v) {
    for (int i = 0; i < kPer; ++i) {
      const int64_t column = static_cast<int64_t>(p.begin + v) * kPer - shift + i;
      values[i] = column >= 0 && column < width ? to_float(x[column]) : -INFINITY;
    }
    add_scaled<kPer>(acc, values, slope);
  };
  const int step = thread_count();
  int v = thread_index();
  if (p.begin == 0 && v == 0) {
    edge(v);
    v += step;
  }
  // The last round is filled up with -inf, which adds nothing: all of its loads are on their way.
  const Vec16 nothing = all_minus_infinity<T>();
  for (; v < whole; v += kLoads * step) {
    Vec16 raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      raw[i] = v + i * step < whole ? load16(from + (v + i * step) * kPer) : nothing;
#pragma unroll
    for (int i = 0; i < kLoads; i += kAtOnce) {
      if (v + i * step >= whole) break;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) unpack<T>(raw[i + k], values + k * kPer);
      add_scaled<kAtOnce * kPer>(acc, values, slope);
    }
  }
  // A piece behind the end of the row has a negative size.
  if (whole >= 0 && whole < p.size && p.begin + whole > 0 && whole % step == thread_index())
    edge(whole);
  return acc;
}

__device__ __forceinline__ MaxSum mix_model_sum(const MixModel& m, int64_t row, float slope,
                                                const Piece& piece) {
  const auto sum = [&](auto* x) { return mix_thread_sum(x, m.width, slope, piece); };
  const void* x = row_of(m, row);
  if (m.dtype == kF32) return sum(static_cast<const float*>(x));
  if (m.dtype == kBF16) return sum(static_cast<const bf16*>(x));
  return sum(static_cast<const f16*>(x));
}

// The weight of model k. The sum of fp32 weights is rounded to fp32, so that (0.7, 0.2, 0.1) leaves
// the base nothing.
__device__ __forceinline__ float mix_weight(const MixArgs& a, int64_t row, int k, bool* valid) {
  *valid = true;
  if (a.row_weights == nullptr) return a.models[k].weight;
  const float* weights = a.row_weights + row * a.weight_stride;
  if (k > 0) return weights[(k - 1) * a.weight_step];
  double sum = 0.0;
#pragma unroll 1
  for (int i = 0; i + 1 < a.count; ++i) {
    const float w = weights[i * a.weight_step];
    *valid = *valid && w >= 0.0f && w <= 1.0f;
    sum += static_cast<double>(w);
  }
  *valid = *valid && sum <= 1.0 + kWeightSlack;
  return fmaxf(0.0f, 1.0f - static_cast<float>(sum));
}

// Fills s.terms. Returns, alike in all threads of the cluster, whether the row has a distribution.
// `all`, `also`: look at every model, at the one of that number (-1: none), whatever its weight;
// the log_sum of a model that has no distribution is NaN. `each`: pieces of a block, in all at most
// kMostBlocks; `warps` has room for them. The blocks of the cluster must have started.
__device__ __forceinline__ bool mix_terms(const MixArgs& a, int64_t row, MixShared& s, bool all,
                                          int also, WarpSums* warps, int each) {
  for (int k = thread_index(); k < a.count; k += thread_count()) {
    bool valid;
    s.weights[k] = mix_weight(a, row, k, &valid);
    if (k == 0) s.weights_valid = valid;
  }
  block_sync();
  const auto needed = [&](int k) { return all || k == also || s.weights[k] > 0.0f; };
  const int first = cluster_rank() * each, pieces = cluster_size() * each;
  const auto piece = [&](int e, int k) { return piece_of(a.models[k], row, first + e, pieces); };
  if (thread_index() == 0) {
#pragma unroll 1
    for (int k = 0; k < a.count; ++k)
      if (needed(k)) prefetch_piece(piece(0, k));
  }
  // No barrier between the pieces: a warp that waits for its loads leaves the others at work.
  for (int e = 0; e < each; ++e) {
    for (int k = 0; k < a.count; ++k) {
      if (!needed(k)) continue;
      if (e + 1 < each && thread_index() == 0) prefetch_piece(piece(e + 1, k));
      const float slope = a.models[k].scale * kLog2E;
      const MaxSum mine = mix_model_sum(a.models[k], row, slope, piece(e, k));
      const MaxSum warp = warp_merge(mine, slope);
      if (lane_index() == 0) warps[e][k][warp_index()] = warp;
    }
  }
  block_sync();
  for (int i = warp_index(); i < each * a.count; i += warp_count()) {
    const int e = i / a.count, k = i % a.count;
    if (!needed(k)) continue;
    const float slope = a.models[k].scale * kLog2E;
    const bool mine = lane_index() < warp_count();
    const MaxSum block = warp_merge(mine ? warps[e][k][lane_index()] : MaxSum{}, slope);
    RowSum out;
    out.max = block.max;
    out.sum = static_cast<double>(block.sum);
    if (lane_index() < cluster_size()) *cluster_shared(&s.pieces[k][first + e], lane_index()) = out;
  }
  cluster_sync();
  for (int k = thread_index(); k < a.count; k += thread_count()) {
    MixTerm& t = s.terms[k];
    t.start = row * a.models[k].stride;
    t.live = s.weights[k] > 0.0f;
    t.scale = a.models[k].scale;
    t.max = t.log_sum = 0.0f;
    t.offset = -INFINITY;
    s.sum_valid[k] = 1;
    if (!needed(k)) continue;
    float max = kLowest;
#pragma unroll 1
    for (int p = 0; p < pieces; ++p) max = fmaxf(max, s.pieces[k][p].max);
    double sum = 0.0;
#pragma unroll 1
    for (int p = 0; p < pieces; ++p) {
      const float distance = (s.pieces[k][p].max - max) * (t.scale * kLog2E);
      sum += s.pieces[k][p].sum * static_cast<double>(exp2_fast(distance));
    }
    const bool valid = sum > 0.0 && sum < static_cast<double>(INFINITY);
    const double log_sum = valid ? log(sum) : static_cast<double>(NAN);
    t.max = max;
    t.log_sum = static_cast<float>(log_sum);
    if (!t.live) continue;
    s.sum_valid[k] = valid;
    t.offset = static_cast<float>(log(static_cast<double>(s.weights[k])) - log_sum);
  }
  block_sync();
  bool valid = s.weights_valid;
  for (int k = 0; k < a.count; ++k) valid = valid && s.sum_valid[k];
  return valid;
}
__device__ __forceinline__ bool mix_terms(const MixArgs& a, int64_t row, MixShared& s, bool all,
                                          int also) {
  return mix_terms(a, row, s, all, also, &s.warps, 1);
}

// ---- the best candidate of a row

template <class K>
__device__ __forceinline__ Best<K> warp_best(Best<K> mine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    Best<K> other;
    other.key = shuffle_xor(mine.key, mask);
    other.id = shuffle_xor(mine.id, mask);
    mine = better(mine, other);
  }
  return mine;
}

// All threads of the cluster get it. A cluster_sync is due before the next call with this `slot`.
template <class K>
__device__ __forceinline__ Best<K> cluster_best(Best<K> mine, MixShared& s, int slot) {
  mine = warp_best(mine);
  if (lane_index() == 0) {
    s.best_keys[warp_index()] = static_cast<double>(mine.key);
    s.best_ids[warp_index()] = mine.id;
  }
  block_sync();
  Best<K> all = {K(0), -1};
  if (lane_index() < warp_count())
    all = {static_cast<K>(s.best_keys[lane_index()]), s.best_ids[lane_index()]};
  all = warp_best(all);
  if (thread_index() < cluster_size()) {
    const int rank = thread_index();
    *cluster_shared(&s.rank_keys[slot][cluster_rank()], rank) = static_cast<double>(all.key);
    *cluster_shared(&s.rank_ids[slot][cluster_rank()], rank) = all.id;
  }
  cluster_sync();
  for (int r = 0; r < cluster_size(); ++r) {
    const Best<K> other = {static_cast<K>(s.rank_keys[slot][r]), s.rank_ids[slot][r]};
    all = r == 0 ? other : better(all, other);
  }
  return all;
}

// The shape of a launch as the launcher chose it.
inline Grid mix_grid(Arguments& in, const MixArgs& a, size_t shared_bytes) {
  Grid grid;
  grid.threads = static_cast<int>(in.integer());
  grid.cluster = static_cast<int>(in.integer());
  const int64_t most = kMostGridBlocks / grid.cluster;
  grid.blocks = (a.rows < most ? a.rows : most) * grid.cluster;
  grid.shared_bytes = shared_bytes;
  grid.stream = in.stream;
  return grid;
}

}  // namespace mdk
