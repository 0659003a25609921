// knn_targets: one block per row sorts its neighbours by token, adds up equal tokens, sorts those
// by probability and leaves them in a workspace; a second kernel packs the rows once their places
// are known. Algorithm, bytes and numerics: mdkernels/ops/knn_targets/README.md, section GPU.
#include "block_sort.cuh"
#include "launch.h"

namespace mdk {
namespace {

constexpr int64_t kTop = 0x7fffffff;  // the largest token id
constexpr float kSmallestNormal = 1.17549435e-38f;

struct KnnTargets {
  const float* distances;  // (rows, neighbors), unit stride within a row
  int64_t distance_stride;
  const void* neighbor_ids;  // likewise
  int64_t id_stride;
  int64_t narrow_ids;  // int32, else int64
  const void* values;
  int64_t num_values;
  int64_t narrow_values;
  const int64_t* exclude_ids;  // or null
  int64_t rows, neighbors;
  float scale;      // log2(e) / temperature
  int64_t* keys;    // (rows, neighbors): of each row the first counts[row]
  int64_t* counts;  // (rows); -1 marks a row with a fault
};

__device__ __forceinline__ int64_t load_integer(const void* at, int64_t narrow, int64_t i) {
  return narrow ? static_cast<const int32_t*>(at)[i] : static_cast<const int64_t*>(at)[i];
}

// A run of equal tokens that ends where it was measured, and its weight.
struct Run {
  int64_t token;
  double mass;
};

// The run at the end of two neighbouring stretches. Tokens ascend, so equal ends mean that the
// whole right stretch is that token.
__device__ __forceinline__ Run join(const Run& left, const Run& right) {
  return {right.token, left.token == right.token ? left.mass + right.mass : right.mass};
}

struct Shared {
  float nearest[kMostWarps];
  int fault[kMostWarps];
  uint64_t first[kMostWarps];  // first key of a warp
  Run last[kMostWarps];
  double mass[kMostWarps];
  int kept[kMostWarps];
};

// keys <- token << 32 | bits of the weight, kNoKey for neighbours without one. False: a fault.
template <int kPer>
__device__ bool weigh(const KnnTargets& a, int64_t row, Shared* shared, uint64_t* keys) {
  const float* distances = a.distances + row * a.distance_stride;
  const int64_t own = a.exclude_ids ? a.exclude_ids[row] : -1;
  const int threads = thread_count();
  int64_t id[kPer], token[kPer];
  float d[kPer];
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    const int64_t column = static_cast<int64_t>(e) * threads + thread_index();
    const bool there = column < a.neighbors;
    id[e] = there ? load_integer(a.neighbor_ids, a.narrow_ids, row * a.id_stride + column) : -1;
    d[e] = there ? distances[column] : INFINITY;
  }
#pragma unroll
  for (int e = 0; e < kPer; ++e)
    token[e] =
        id[e] >= 0 && id[e] < a.num_values ? load_integer(a.values, a.narrow_values, id[e]) : 0;
  float nearest = INFINITY;
  bool fault = false;
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    const bool counts = id[e] >= 0 && id[e] != own;
    fault |= id[e] < -1 || id[e] >= a.num_values || token[e] < 0 || token[e] > kTop;
    fault |= counts && !(d[e] > -INFINITY);
    if (!counts) d[e] = INFINITY;
    if (d[e] < nearest) nearest = d[e];
  }
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(nearest, mask);
    nearest = other < nearest ? other : nearest;
  }
  const bool any_fault = ballot(fault) != 0;
  if (lane_index() == 0) {
    shared->nearest[warp_index()] = nearest;
    shared->fault[warp_index()] = any_fault;
  }
  block_sync();
  fault = false;
  for (int w = 0; w < warp_count(); ++w) {
    nearest = shared->nearest[w] < nearest ? shared->nearest[w] : nearest;
    fault |= shared->fault[w] != 0;
  }
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    // Infinity minus infinity is NaN, which fails the comparison.
    const float weight = exp2_fast((nearest - d[e]) * a.scale);
    keys[e] = weight >= kSmallestNormal
                  ? static_cast<uint64_t>(token[e]) << 32 | float_to_bits(weight)
                  : kNoKey;
  }
  return !fault;
}

// keys, sorted by token <- of each token one key that sorts by descending probability, then by
// ascending token, at the place of its last neighbour; kNoKey elsewhere.
template <int kPer>
__device__ void merge(Shared* shared, uint64_t* keys) {
  const int lane = lane_index(), warp = warp_index();
  double mass[kPer];  // of the run that ends at e, as far as it lies in this thread
  double total = 0.0;
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    const double weight =
        keys[e] == kNoKey ? 0.0 : bits_to_float(static_cast<unsigned>(keys[e] & 0xffffffffu));
    total += weight;
    mass[e] = weight;
    if (e > 0 && keys[e] >> 32 == keys[e - 1] >> 32) mass[e] += mass[e - 1];
  }
  Run run = {static_cast<int64_t>(keys[kPer - 1] >> 32), mass[kPer - 1]};
  Run before = run;  // the run that ends where this thread begins, within the warp
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    Run left;
    left.token = shuffle_up(run.token, step);
    left.mass = shuffle_up(run.mass, step);
    if (lane >= step) run = join(left, run);
  }
  before.token = shuffle_up(run.token, 1);
  before.mass = shuffle_up(run.mass, 1);
  uint64_t following = shuffle(keys[0], (lane + 1) % kWarp);
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  if (lane == 0) {
    shared->first[warp] = keys[0];
    shared->mass[warp] = total;
  }
  if (lane == kWarp - 1) shared->last[warp] = run;
  block_sync();

  total = 0.0;
  Run carry = {-1, 0.0};
  for (int w = 0; w < warp_count(); ++w) {
    total += shared->mass[w];
    if (w < warp) carry = w == 0 ? shared->last[0] : join(carry, shared->last[w]);
  }
  before = lane == 0 ? carry : join(carry, before);
  if (lane == kWarp - 1) following = warp + 1 < warp_count() ? shared->first[warp + 1] : kNoKey;
  const double inverse = total > 0.0 ? 1.0 / total : 0.0;
  const int64_t first_token = static_cast<int64_t>(keys[0] >> 32);
#pragma unroll
  for (int e = 0; e < kPer; ++e) {
    const uint64_t key = keys[e], next = e + 1 < kPer ? keys[e + 1 < kPer ? e + 1 : e] : following;
    const int64_t token = static_cast<int64_t>(key >> 32);
    const double sum =
        mass[e] + (token == first_token && token == before.token ? before.mass : 0.0);
    const float p = static_cast<float>(sum * inverse);
    const bool kept =
        key != kNoKey && token != static_cast<int64_t>(next >> 32) && p >= kSmallestNormal;
    keys[e] = kept ? static_cast<uint64_t>(0x7fffffffu - float_to_bits(p)) << 32 |
                         static_cast<uint64_t>(token)
                   : kNoKey;
  }
}

// Moves the keys to the front of `out` in any order; returns how many there are.
template <int kPer>
__device__ int compact(Shared* shared, const uint64_t* keys, uint64_t* out) {
  int mine = 0;
#pragma unroll
  for (int e = 0; e < kPer; ++e) mine += keys[e] != kNoKey;
  int upto = mine;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int left = shuffle_up(upto, step);
    if (lane_index() >= step) upto += left;
  }
  if (lane_index() == kWarp - 1) shared->kept[warp_index()] = upto;
  block_sync();
  int place = upto - mine, count = 0;
  for (int w = 0; w < warp_count(); ++w) {
    if (w < warp_index()) place += shared->kept[w];
    count += shared->kept[w];
  }
#pragma unroll
  for (int e = 0; e < kPer; ++e)
    if (keys[e] != kNoKey) out[place++] = keys[e];
  block_sync();
  return count;
}

template <int kPer>
__global__ void __launch_bounds__(kMostThreads) knn_merge_kernel(const KnnTargets a) {
  Shared* shared = reinterpret_cast<Shared*>(shared_memory());
  uint64_t* exchange = reinterpret_cast<uint64_t*>(shared + 1);
  const int capacity = kPer * thread_count(), mine = kPer * thread_index();
  for (int64_t row = block_index(); row < a.rows; row += block_count()) {
    uint64_t keys[kPer];
    if (!weigh<kPer>(a, row, shared, keys)) {
      if (thread_index() == 0) a.counts[row] = -1;
      block_sync();  // the next row overwrites what decided this
      continue;
    }
    block_sort<kPer>(keys, capacity, exchange);
    merge<kPer>(shared, keys);
    const int count = compact<kPer>(shared, keys, exchange);
#pragma unroll
    for (int e = 0; e < kPer; ++e) keys[e] = mine + e < count ? exchange[mine + e] : kNoKey;
    block_sync();
    int length = kPer;
    while (length < count) length *= 2;
    block_sort<kPer>(keys, length, exchange);
    int64_t* out = a.keys + row * a.neighbors;
#pragma unroll
    for (int e = 0; e < kPer; ++e)
      if (mine + e < count) out[mine + e] = static_cast<int64_t>(keys[e]);
    if (thread_index() == 0) a.counts[row] = count;
  }
}

struct Pack {
  const int64_t* keys;  // (rows, neighbors)
  int64_t rows, neighbors;
  const int64_t* row_offsets;
  int32_t* token_ids;
  float* probs;
};

constexpr int kPackThreads = 128;  // a warp per row

__global__ void __launch_bounds__(kPackThreads) knn_pack_kernel(const Pack a) {
  const int64_t step = block_count() * warp_count();
  for (int64_t row = block_index() * warp_count() + warp_index(); row < a.rows; row += step) {
    const int64_t begin = a.row_offsets[row], count = a.row_offsets[row + 1] - begin;
    for (int64_t i = lane_index(); i < count; i += kWarp) {
      const int64_t key = a.keys[row * a.neighbors + i];
      a.token_ids[begin + i] = static_cast<int32_t>(key & kTop);
      a.probs[begin + i] = bits_to_float(0x7fffffffu - static_cast<unsigned>(key >> 32));
    }
  }
}

template <int kPer>
void start(const KnnTargets& a, Grid& grid) {
  int threads = kWarp;
  while (static_cast<int64_t>(kPer) * threads < a.neighbors) threads *= 2;
  grid.threads = threads;
  grid.shared_bytes = sizeof(Shared) + sizeof(uint64_t) * kPer * threads;
  launch<knn_merge_kernel<kPer>>(grid, a);
}

}  // namespace

void knn_targets_merge(Arguments& in) {
  KnnTargets a;
  a.distances = in.pointer<float>();
  a.distance_stride = in.integer();
  a.neighbor_ids = in.pointer<void>();
  a.id_stride = in.integer();
  a.narrow_ids = in.integer();
  a.values = in.pointer<void>();
  a.num_values = in.integer();
  a.narrow_values = in.integer();
  a.exclude_ids = in.pointer<int64_t>();
  a.rows = in.integer();
  a.neighbors = in.integer();
  a.scale = static_cast<float>(in.real());
  a.keys = in.pointer<int64_t>();
  a.counts = in.pointer<int64_t>();
  in.done();
  if (a.rows == 0) return;
  Grid grid;
  grid.blocks = a.rows < kMostGridBlocks ? a.rows : kMostGridBlocks;
  grid.stream = in.stream;
  if (a.neighbors <= 2 * kWarp)
    start<2>(a, grid);
  else
    start<8>(a, grid);
}

void knn_targets_pack(Arguments& in) {
  Pack a;
  a.keys = in.pointer<int64_t>();
  a.rows = in.integer();
  a.neighbors = in.integer();
  a.row_offsets = in.pointer<int64_t>();
  a.token_ids = in.pointer<int32_t>();
  a.probs = in.pointer<float>();
  in.done();
  if (a.rows == 0) return;
  Grid grid;
  grid.threads = kPackThreads;
  const int64_t rows_at_once = kPackThreads / kWarp;
  const int64_t blocks = (a.rows + rows_at_once - 1) / rows_at_once;
  grid.blocks = blocks < kMostGridBlocks ? blocks : kMostGridBlocks;
  grid.stream = in.stream;
  launch<knn_pack_kernel>(grid, a);
}

}  // namespace mdk
