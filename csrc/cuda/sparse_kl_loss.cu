// What surrounds the kernel of sparse_kl in a step in place: the factors of its rows and the
// reduced loss, one launch each. As some fifteen small torch operations they take a tenth of the
// step.
#include "launch.h"
#include "online_softmax.cuh"

namespace mdk {
namespace {

constexpr int kThreads = 512;  // of the one block

template <class T>
__device__ __forceinline__ T block_add(T value, T* warps) {
  value = warp_add(value);
  if (lane_index() == 0) warps[warp_index()] = value;
  block_sync();
  value = warp_add(lane_index() < warp_count() ? warps[lane_index()] : T(0));
  block_sync();
  return value;
}

struct LossCoefs {
  const int64_t* labels;  // (rows), or null: all rows count
  int64_t rows, ignore_index;
  bool mean;
  float kl_weight, ce_weight;
  float* out;  // d(loss)/d(kl_row), d(loss)/d(ce_row), what the sums are divided by
};

__global__ void __launch_bounds__(kThreads) coefs_kernel(const LossCoefs a) {
  int64_t valid = 0;
  if (a.mean && a.labels != nullptr)
    for (int64_t row = thread_index(); row < a.rows; row += thread_count())
      valid += a.labels[row] != a.ignore_index;
  valid = block_add(valid, reinterpret_cast<int64_t*>(shared_memory()));
  if (thread_index() != 0) return;
  if (a.labels == nullptr) valid = a.rows;
  const float count = a.mean && valid > 0 ? static_cast<float>(valid) : 1.0f;
  const float row = 1.0f / count;
  a.out[0] = a.kl_weight * row;
  a.out[1] = a.ce_weight * row;
  a.out[2] = count;
}

struct LossSums {
  const float* kl;  // (rows)
  const float* ce;
  int64_t rows;
  float kl_weight, ce_weight;
  const float* count;
  float* loss;
  float* kl_out;
  float* ce_out;
};

__global__ void __launch_bounds__(kThreads) sums_kernel(const LossSums a) {
  double kl = 0.0, ce = 0.0;
  for (int64_t row = thread_index(); row < a.rows; row += thread_count()) {
    kl += static_cast<double>(a.kl[row]);
    ce += static_cast<double>(a.ce[row]);
  }
  kl = block_add(kl, reinterpret_cast<double*>(shared_memory()));
  ce = block_add(ce, reinterpret_cast<double*>(shared_memory()));
  if (thread_index() != 0) return;
  const float kl_mean = static_cast<float>(kl / *a.count);
  const float ce_mean = static_cast<float>(ce / *a.count);
  *a.kl_out = kl_mean;
  *a.ce_out = ce_mean;
  // A weight of 0 drops its term: 0 * inf is NaN.
  *a.loss = a.kl_weight == 0.0f   ? ce_mean
            : a.ce_weight == 0.0f ? kl_mean
                                  : a.kl_weight * kl_mean + a.ce_weight * ce_mean;
}

Grid one_block(Arguments& in) {
  Grid grid;
  grid.blocks = 1;
  grid.threads = kThreads;
  grid.shared_bytes = sizeof(double) * (kThreads / kWarp);
  grid.stream = in.stream;
  return grid;
}

}  // namespace

void sparse_kl_coefs(Arguments& in) {
  LossCoefs a;
  a.labels = in.pointer<int64_t>();
  a.rows = in.integer();
  a.ignore_index = in.integer();
  a.mean = in.integer() != 0;
  a.kl_weight = static_cast<float>(in.real());
  a.ce_weight = static_cast<float>(in.real());
  a.out = in.pointer<float>();
  in.done();
  launch<coefs_kernel>(one_block(in), a);
}

void sparse_kl_sums(Arguments& in) {
  LossSums a;
  a.kl = in.pointer<float>();
  a.ce = in.pointer<float>();
  a.rows = in.integer();
  a.kl_weight = static_cast<float>(in.real());
  a.ce_weight = static_cast<float>(in.real());
  a.count = in.pointer<float>();
  a.loss = in.pointer<float>();
  a.kl_out = in.pointer<float>();
  a.ce_out = in.pointer<float>();
  in.done();
  launch<sums_kernel>(one_block(in), a);
}

}  // namespace mdk
