// One-pass log-sum-exp, shared by the kernels: running (maximum, sum) pairs and their combination
// in a warp, a block and a cluster. Every combination is in a fixed order, so results repeat.
//
// Infinities and NaN behave as in torch.logsumexp and log_softmax: a row with NaN or +inf has sum
// NaN; a row of -inf has sum 0. `max` starts at the lowest finite float, so that -inf minus it is
// -inf and not NaN. A NaN logit never becomes `max` (fmaxf drops it) but always enters the sum.
#pragma once
#include <math.h>

#include "numbers.cuh"

namespace mdk {

constexpr float kLowest = -3.402823466e38f;
constexpr float kLog2E = 1.4426950408889634f;

// sum_j exp(x_j) = sum * exp(max)
struct MaxSum {
  float max = kLowest;
  float sum = 0.0f;
};

// The same for a row; the parts of a cluster are added in fp64.
struct RowSum {
  float max = kLowest;
  double sum = 0.0;
};

// exp(x - max). Subtract first: a product with log2(e) ahead of the subtraction would be rounded at
// the size of x, which at 1e4 costs three digits.
__device__ __forceinline__ float exp_from(float x, float max) {
  return exp2_fast((x - max) * kLog2E);
}

// Adds kCount values at once: one rescaling exponential for all of them.
template <int kCount>
__device__ __forceinline__ void accumulate(MaxSum& acc, const float* x) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmaxf(top, x[i]);
  const float max = fmaxf(acc.max, top);
  float even = 0.0f, odd = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) (i % 2 ? odd : even) += exp_from(x[i], max);
  acc.sum = acc.sum * exp_from(acc.max, max) + (even + odd);
  acc.max = max;
}

__device__ __forceinline__ MaxSum combine(MaxSum a, MaxSum b) {
  MaxSum c;
  c.max = fmaxf(a.max, b.max);
  c.sum = a.sum * exp_from(a.max, c.max) + b.sum * exp_from(b.max, c.max);
  return c;
}

__device__ __forceinline__ RowSum combine(RowSum a, RowSum b) {
  RowSum c;
  c.max = fmaxf(a.max, b.max);
  c.sum = a.sum * static_cast<double>(exp_from(a.max, c.max)) +
          b.sum * static_cast<double>(exp_from(b.max, c.max));
  return c;
}

// All lanes get the result.
__device__ __forceinline__ MaxSum warp_combine(MaxSum mine) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    MaxSum other;
    other.max = shuffle_xor(mine.max, mask);
    other.sum = shuffle_xor(mine.sum, mask);
    mine = combine(mine, other);
  }
  return mine;
}

template <class T>
__device__ __forceinline__ T warp_add(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// All threads get the result. `warps` is shared memory for warp_count() pairs. Begins with a write
// and ends with a read of it: a block_sync is due before the next use.
__device__ __forceinline__ RowSum block_combine(MaxSum mine, MaxSum* warps) {
  mine = warp_combine(mine);
  if (lane_index() == 0) warps[warp_index()] = mine;
  block_sync();
  // Every warp combines all of them, one per lane: shorter than a loop, and no second barrier.
  const MaxSum all = warp_combine(lane_index() < warp_count() ? warps[lane_index()] : MaxSum{});
  RowSum row;
  row.max = all.max;
  row.sum = static_cast<double>(all.sum);
  return row;
}

constexpr int kMostBlocks = 8;  // of a cluster

// A barrier of all threads that work on a row.
__device__ __forceinline__ void everybody_sync() {
  if (cluster_size() > 1)
    cluster_sync();
  else
    block_sync();
}

// All threads of all blocks of the cluster get the result; `row` is the same in all threads of a
// block. `ranks` is shared memory for kMostBlocks rows, and here too a cluster_sync is due before
// its next use. The blocks must have met in a cluster_sync since the start of the kernel.
__device__ __forceinline__ RowSum cluster_combine(RowSum row, RowSum* ranks) {
  const int size = cluster_size();
  if (size == 1) return row;
  if (thread_index() < size) *cluster_shared(ranks + cluster_rank(), thread_index()) = row;
  cluster_sync();
  RowSum whole;
  for (int r = 0; r < size; ++r) whole = combine(whole, ranks[r]);
  return whole;
}

}  // namespace mdk
