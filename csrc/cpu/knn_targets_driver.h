#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "checks.h"
#include "kernels.h"

namespace mdk {

// The rows a thread has finished, packed one after the other.
struct PackedRows {
  std::unique_ptr<int32_t[]> token_ids;
  std::unique_ptr<float[]> probs;
  int64_t capacity = 0, used = 0;

  // Room for `extra` more entries.
  void reserve(int64_t extra);
};

// The output size of knn_targets is known only afterwards: the rows wait here until the caller has
// allocated exactly that much.
class KnnRows {
 public:
  int64_t nnz() const { return nnz_; }

  // row_offsets: (rows + 1); token_ids, probs: (nnz).
  void copy_to(int64_t* row_offsets, int32_t* token_ids, float* probs) const;

  // On a fault, that of the first faulty row, there is no result.
  Fault run(const MdkKnnTargets& args, int threads);

 private:
  struct Chunk {
    int thread;
    int64_t start;  // of its first row in that thread's rows
  };
  int64_t chunk_rows_ = 1, nnz_ = 0;
  std::vector<int64_t> lengths_;
  std::vector<Chunk> chunks_;
  std::vector<PackedRows> packed_;
};

}  // namespace mdk
