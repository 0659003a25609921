// token_logprobs: log-softmax of one token per row. Reads the logits once and keeps nothing of
// them. Reasons and bytes: mdkernels/ops/sparse_kl/README.md.
#include "launch.h"
#include "online_softmax.cuh"

namespace mdk {
namespace {

struct TokenLogprobs {
  const void* logits;  // (rows, vocab), unit stride within a row
  int64_t row_stride;  // elements
  int64_t rows, vocab;
  const int64_t* labels;
  int64_t ignore_index;
  float* logprobs;  // (rows) nats
  double* lse;      // (rows) nats
};

constexpr int kMostThreads = 512;
constexpr int kAtOnce = 4;  // 16-byte loads of a thread in flight

struct Shared {
  MaxSum warps[kMostThreads / kWarp];
  RowSum ranks[kMostBlocks];
};

// The part of a row between two 16-byte boundaries can only be partly inside the row at its ends.
template <class T>
__device__ __forceinline__ void load_edge(const T* x, int64_t column, int64_t vocab, float* out) {
  for (int i = 0; i < kPerVec<T>; ++i, ++column)
    out[i] = column >= 0 && column < vocab ? to_float(x[column]) : -INFINITY;
}

template <class T>
__device__ MaxSum thread_sum(const T* x, int64_t vocab) {
  constexpr int kPer = kPerVec<T>, kTogether = 16 / kPer;
  const int shift = misalignment(x);
  const int64_t vectors = (vocab + shift + kPer - 1) / kPer;
  const int64_t step = static_cast<int64_t>(thread_count()) * cluster_size();
  int64_t v = static_cast<int64_t>(cluster_rank()) * thread_count() + thread_index();
  MaxSum acc;
  float values[kTogether * kPer];
  if (v == 0 || v == vectors - 1) {
    load_edge(x, v * kPer - shift, vocab, values);
    accumulate<kPer>(acc, values);
    v += step;
  }
  const T* aligned = x - shift;
  // v is at least 1 from here on: the first block of 16 bytes is done.
  for (; v + (kAtOnce - 1) * step < vectors - 1; v += kAtOnce * step) {
    Vec16 raw[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) raw[i] = load16_once(aligned + (v + i * step) * kPer);
#pragma unroll
    for (int i = 0; i < kAtOnce; i += kTogether) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k) unpack<T>(raw[i + k], values + k * kPer);
      accumulate<kTogether * kPer>(acc, values);
    }
  }
  for (; v < vectors; v += step) {
    if (v < vectors - 1)
      unpack<T>(load16_once(aligned + v * kPer), values);
    else
      load_edge(x, v * kPer - shift, vocab, values);
    accumulate<kPer>(acc, values);
  }
  return acc;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) token_logprobs_kernel(const TokenLogprobs a) {
  Shared* shared = reinterpret_cast<Shared*>(shared_memory());
  const int64_t step = block_count() / cluster_size();
  if (cluster_size() > 1) cluster_sync();  // the others have started
  for (int64_t row = block_index() / cluster_size(); row < a.rows; row += step) {
    const T* x = static_cast<const T*>(a.logits) + row * a.row_stride;
    const int64_t label = a.labels[row];
    const bool writes = cluster_rank() == 0 && thread_index() == 0;
    if (label == a.ignore_index) {
      if (writes) {
        a.logprobs[row] = 0.0f;
        a.lse[row] = 0.0;
      }
      continue;
    }
    const bool inside = label >= 0 && label < a.vocab;
    float gold = NAN;
    if (writes && inside) gold = to_float(x[label]);  // on its way while the row is read
    RowSum sum = block_combine(thread_sum(x, a.vocab), shared->warps);
    sum = cluster_combine(sum, shared->ranks);
    if (writes) {
      const double log_normalizer = log(sum.sum);
      const double distance = static_cast<double>(gold) - static_cast<double>(sum.max);
      a.logprobs[row] = static_cast<float>(distance - log_normalizer);
      a.lse[row] = inside ? static_cast<double>(sum.max) + log_normalizer : NAN;
    }
    if (row + step < a.rows) everybody_sync();  // the next row reuses the shared memory
  }
}

template <class T>
void start(const TokenLogprobs& a, const Grid& grid) {
  launch<token_logprobs_kernel<T>>(grid, a);
}

}  // namespace

void token_logprobs(Arguments& in) {
  TokenLogprobs a;
  a.logits = in.pointer<void>();
  a.row_stride = in.integer();
  a.rows = in.integer();
  a.vocab = in.integer();
  const int64_t dtype = in.integer();
  a.labels = in.pointer<int64_t>();
  a.ignore_index = in.integer();
  a.logprobs = in.pointer<float>();
  a.lse = in.pointer<double>();
  Grid grid;
  grid.threads = static_cast<int>(in.integer());
  grid.cluster = static_cast<int>(in.integer());
  in.done();
  if (a.rows == 0) return;

  // Six blocks of 256 threads share a multiprocessor. Where there are fewer rows than that, the
  // blocks of a cluster share one, and blocks grow.
  const Device& device = current_device();
  const bool few = a.rows < 2 * device.multiprocessors;
  const int64_t row_bytes = a.vocab * (dtype == kF32 ? 4 : 2);
  if (grid.cluster == 0)
    grid.cluster = few && device.capability >= 90 && row_bytes >= 64 * 1024 ? 8 : 1;
  if (grid.threads == 0) grid.threads = row_bytes < 8 * 1024 ? 64 : few ? kMostThreads : 256;
  const int64_t most = kMostGridBlocks / grid.cluster;
  grid.blocks = (a.rows < most ? a.rows : most) * grid.cluster;
  grid.shared_bytes = sizeof(Shared);
  grid.stream = in.stream;
  if (dtype == kF32)
    start<float>(a, grid);
  else if (dtype == kBF16)
    start<bf16>(a, grid);
  else
    start<f16>(a, grid);
}

}  // namespace mdk
