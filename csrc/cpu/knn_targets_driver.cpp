#include "knn_targets_driver.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace mdk {
namespace {

constexpr int64_t kSlack = 64;  // elements: completes the last vector of any instruction set

struct Scratch {
  std::vector<MdkTokenSlot> table;
  std::vector<float> weights;
  std::vector<int32_t> integers;
  std::vector<double> sums;
  std::vector<int64_t> keys;
  MdkKnnScratch view;
  Fault fault = no_fault;

  explicit Scratch(int64_t neighbors) {
    const int64_t capacity = neighbors + kSlack;
    uint32_t bits = 7;
    while ((int64_t{1} << bits) < 2 * neighbors) ++bits;
    table.assign(size_t{1} << bits, MdkTokenSlot{-1, 0});
    weights.resize(capacity);
    integers.resize(3 * capacity);
    sums.resize(capacity);
    keys.resize(2 * capacity);
    view = {table.data(),
            32 - bits,
            weights.data(),
            integers.data(),
            integers.data() + capacity,
            sums.data(),
            integers.data() + 2 * capacity,
            keys.data(),
            keys.data() + capacity,
            0,
            0};
  }
};

const char* fault_name(int64_t code) {
  if (code == MDK_KNN_ID) return "neighbor_id";
  return code == MDK_KNN_DISTANCE ? "distance" : "value";
}

}  // namespace

void PackedRows::reserve(int64_t extra) {
  if (used + extra <= capacity) return;
  const int64_t grown = std::max(used + extra, 2 * capacity);
  std::unique_ptr<int32_t[]> ids(new int32_t[grown]);
  std::unique_ptr<float[]> values(new float[grown]);
  if (used > 0) {
    std::memcpy(ids.get(), token_ids.get(), used * sizeof(int32_t));
    std::memcpy(values.get(), probs.get(), used * sizeof(float));
  }
  token_ids = std::move(ids);
  probs = std::move(values);
  capacity = grown;
}

Fault KnnRows::run(const MdkKnnTargets& args, int threads) {
  const auto body = kernels().knn_targets;
  chunk_rows_ = std::max<int64_t>(1, args.rows / (16 * std::max(threads, 1)));
  const int64_t chunks = (args.rows + chunk_rows_ - 1) / chunk_rows_;
  const int workers = usable_threads(chunks, threads);
  std::vector<Scratch> scratch;
  scratch.reserve(workers);  // `view` points into its own vectors: elements must not move
  for (int i = 0; i < workers; ++i) scratch.emplace_back(args.neighbors);
  packed_.resize(workers);
  chunks_.resize(chunks);
  lengths_.resize(args.rows);

  std::atomic<int64_t> first_fault{args.rows};
  parallel_rows(args.rows, threads, chunk_rows_, [&](int thread, int64_t begin, int64_t end) {
    PackedRows& packed = packed_[thread];
    for (int64_t row = begin; row < end; ++row) {
      if ((row - begin) % chunk_rows_ == 0) chunks_[row / chunk_rows_] = {thread, packed.used};
      if (row > first_fault.load(std::memory_order_relaxed)) return;
      packed.reserve(args.neighbors);
      MdkKnnScratch* view = &scratch[thread].view;
      const int64_t count = body(&args, view, row, packed.token_ids.get() + packed.used,
                                 packed.probs.get() + packed.used);
      if (count < 0) {
        if (Fault& fault = scratch[thread].fault; fault.what == nullptr || row < fault.row)
          fault = {fault_name(count), row, view->fault_value};
        int64_t seen = first_fault.load();
        while (row < seen && !first_fault.compare_exchange_weak(seen, row)) {
        }
        return;
      }
      lengths_[row] = count;
      packed.used += count;
    }
  });
  for (const Scratch& one : scratch)
    if (one.fault.what != nullptr && one.fault.row == first_fault.load()) return one.fault;
  for (const int64_t length : lengths_) nnz_ += length;
  return no_fault;
}

void KnnRows::copy_to(int64_t* row_offsets, int32_t* token_ids, float* probs) const {
  const auto rows = static_cast<int64_t>(lengths_.size());
  row_offsets[0] = 0;
  for (int64_t row = 0; row < rows; ++row) row_offsets[row + 1] = row_offsets[row] + lengths_[row];
  for (size_t i = 0; i < chunks_.size(); ++i) {
    const int64_t begin = static_cast<int64_t>(i) * chunk_rows_;
    const int64_t first = row_offsets[begin];
    const int64_t size = row_offsets[std::min(begin + chunk_rows_, rows)] - first;
    if (size == 0) continue;
    const PackedRows& packed = packed_[chunks_[i].thread];
    std::memcpy(token_ids + first, packed.token_ids.get() + chunks_[i].start,
                size * sizeof(int32_t));
    std::memcpy(probs + first, packed.probs.get() + chunks_[i].start, size * sizeof(float));
  }
}

}  // namespace mdk
