// What the mixture operators share: weights, the normaliser of every model in one read, and the
// mixture at four columns. Derivation: mdkernels/ops/logit_mix/README.md.
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

// log weight + log_softmax(x scale) = (x - max) scale + offset
struct MixTerm {
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

struct MixShared {
  double best_keys[kMixWarps], rank_keys[2][kMostBlocks];
  RowSum pieces[kMostModels][kMostBlocks];
  MaxSum warps[kMostModels][kMixWarps];
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

// This thread's part of a piece, in 16-byte blocks of memory (see misalignment()). A piece is a
// contiguous share of the row, which the second look of its block then finds in the nearest cache.
template <class T>
__device__ MaxSum mix_thread_sum(const T* x, int64_t width, float slope, int piece, int pieces) {
  // kAtOnce 16-byte blocks share a rescaling exponential, kLoads of them are on their way.
  constexpr int kPer = kPerVec<T>, kAtOnce = 16 / kPer, kLoads = 4;
  const int shift = misalignment(x);
  const int64_t vectors = (width + shift + kPer - 1) / kPer;
  const int64_t share = (vectors + pieces - 1) / pieces;
  const int64_t begin = piece * share, left = vectors - begin;
  const int size = static_cast<int>(left < share ? left : share);
  const int whole = size < left ? size : size - 1;  // without the last block of the row
  const T* from = x - shift + begin * kPer;
  MaxSum acc;
  float values[kAtOnce * kPer];
  const auto edge = [&](int v) {
    for (int i = 0; i < kPer; ++i) {
      const int64_t column = (begin + v) * kPer - shift + i;
      values[i] = column >= 0 && column < width ? to_float(x[column]) : -INFINITY;
    }
    add_scaled<kPer>(acc, values, slope);
  };
  const int step = thread_count();
  int v = thread_index();
  if (begin == 0 && v == 0) {
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
  if (whole >= 0 && whole < size && begin + whole > 0 && whole % step == thread_index())
    edge(whole);
  return acc;
}

__device__ __forceinline__ const void* row_of(const MixModel& m, int64_t row) {
  return static_cast<const char*>(m.x) + row * m.stride * (m.dtype == kF32 ? 4 : 2);
}

__device__ __forceinline__ MaxSum mix_model_sum(const MixModel& m, int64_t row, float slope,
                                                int piece, int pieces) {
  const auto sum = [&](auto* x) { return mix_thread_sum(x, m.width, slope, piece, pieces); };
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
// kMostBlocks. The blocks of the cluster must have started.
__device__ __forceinline__ bool mix_terms(const MixArgs& a, int64_t row, MixShared& s, bool all,
                                          int also, int each = 1) {
  for (int k = thread_index(); k < a.count; k += thread_count()) {
    bool valid;
    s.weights[k] = mix_weight(a, row, k, &valid);
    if (k == 0) s.weights_valid = valid;
  }
  block_sync();
  const auto needed = [&](int k) { return all || k == also || s.weights[k] > 0.0f; };
  const int pieces = cluster_size() * each;
  for (int e = 0; e < each; ++e) {
    const int piece = cluster_rank() * each + e;
    if (e > 0) block_sync();  // the piece before has been read
    for (int k = 0; k < a.count; ++k) {
      if (!needed(k)) continue;
      const float slope = a.models[k].scale * kLog2E;
      const MaxSum mine = mix_model_sum(a.models[k], row, slope, piece, pieces);
      const MaxSum warp = warp_merge(mine, slope);
      if (lane_index() == 0) s.warps[k][warp_index()] = warp;
    }
    block_sync();
    for (int k = warp_index(); k < a.count; k += warp_count()) {
      if (!needed(k)) continue;
      const float slope = a.models[k].scale * kLog2E;
      const bool mine = lane_index() < warp_count();
      const MaxSum block = warp_merge(mine ? s.warps[k][lane_index()] : MaxSum{}, slope);
      RowSum out;
      out.max = block.max;
      out.sum = static_cast<double>(block.sum);
      if (lane_index() < cluster_size()) *cluster_shared(&s.pieces[k][piece], lane_index()) = out;
    }
  }
  cluster_sync();
  for (int k = thread_index(); k < a.count; k += thread_count()) {
    MixTerm& t = s.terms[k];
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

// ---- the second look: some columns at a time; four are the tokens of one block of random words

constexpr int kQuad = 4;

// This block's columns [begin, end); begin is a multiple of kTogether.
struct Columns {
  int64_t begin, end;
};
template <int kTogether = kQuad>
__host__ __device__ __forceinline__ int64_t columns_per_block(int64_t width, int blocks) {
  const int64_t each = (width + blocks - 1) / blocks;
  return (each + kTogether - 1) / kTogether * kTogether;
}
template <int kTogether = kQuad>
__device__ __forceinline__ Columns my_columns(int64_t width) {
  const int64_t each = columns_per_block<kTogether>(width, cluster_size());
  const int64_t begin = cluster_rank() * each;
  return {begin, begin + each < width ? begin + each : width};
}

// kCount columns as one access, or as several of 16 bytes.
template <class T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Several {
  T value[kCount];
};
template <int kCount, class T>
__device__ __forceinline__ void load_from(const T* x, int64_t column, int64_t width, float* out) {
  const T* at = x + column;
  if (column >= 0 && column + kCount <= width &&
      reinterpret_cast<uintptr_t>(at) % alignof(Several<T, kCount>) == 0) {
    if constexpr (kCount * sizeof(T) >= 16) {
#pragma unroll
      for (int i = 0; i < kCount; i += kPerVec<T>) unpack<T>(load16(at + i), out + i);
    } else {
      const Several<T, kCount> v = *reinterpret_cast<const Several<T, kCount>*>(at);
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[i] = to_float(v.value[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    out[i] = column + i >= 0 && column + i < width ? to_float(at[i]) : -INFINITY;
}

// -inf outside the width of the model.
template <int kCount>
__device__ __forceinline__ void load_columns(const MixModel& m, int64_t row, int64_t column,
                                             float* out) {
  const void* x = row_of(m, row);
  if (m.dtype == kF32)
    load_from<kCount>(static_cast<const float*>(x), column, m.width, out);
  else if (m.dtype == kBF16)
    load_from<kCount>(static_cast<const bf16*>(x), column, m.width, out);
  else
    load_from<kCount>(static_cast<const f16*>(x), column, m.width, out);
}
__device__ __forceinline__ void load_quad(const MixModel& m, int64_t row, int64_t column,
                                          float* out) {
  load_columns<kQuad>(m, row, column, out);
}

// log(1 + x) for x in [0, 1], absolute error 3e-8 plus rounding; exactly 0 at 0.
__device__ __forceinline__ float log1p_unit(float x) {
  float p = fmaf(0.00538406206362f, x, -0.0301109685962f);
  p = fmaf(p, x, 0.079210751614f);
  p = fmaf(p, x, -0.137466237322f);
  p = fmaf(p, x, 0.191451175029f);
  p = fmaf(p, x, -0.248529461627f);
  p = fmaf(p, x, 0.333203436281f);
  p = fmaf(p, x, -0.499995525949f);
  p = fmaf(p, x, 0.999999974534f);
  return p * x;
}

__device__ __forceinline__ float log_add(float a, float b) {
  const float high = fmaxf(a, b);
  // Two -inf give -inf: the finite floor keeps their difference from being NaN.
  const float distance = fminf(a, b) - fmaxf(high, kLowest);
  return high + log1p_unit(exp2_fast(distance * kLog2E));
}

// log p of a valid row at some columns; -inf where no model reaches.
template <int kCount>
__device__ __forceinline__ void mix_columns(const MixArgs& a, const MixShared& s, int64_t row,
                                            int64_t column, float* out) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = -INFINITY;
  bool first = true;
  for (int k = 0; k < a.count; ++k) {
    const MixTerm t = s.terms[k];
    if (!t.live) continue;
    float x[kCount];
    load_columns<kCount>(a.models[k], row, column, x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // x - max comes first because it is exact or nearly so, also for logits around 1e4.
      const float term = fmaf(x[i] - t.max, t.scale, t.offset);
      out[i] = first ? term : log_add(out[i], term);
    }
    first = false;
  }
}
__device__ __forceinline__ void mix_quad(const MixArgs& a, const MixShared& s, int64_t row,
                                         int64_t column, float* out) {
  mix_columns<kQuad>(a, s, row, column, out);
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
