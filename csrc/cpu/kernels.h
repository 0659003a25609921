// What an instruction-set file provides: one table of plain functions, each working on a range of
// rows. Threads, validation and allocation live outside (the *_driver.cpp files and Python), so
// these functions need nothing but pointers, sizes and strides.
//
// Everything here is C-like on purpose: kernels_<isa>.cpp files are compiled with flags that the
// running machine may not support, so they must not emit a weak symbol (any std:: template) that
// the linker could pick for the rest of the library.
#pragma once
#include <stdint.h>

#include "mix_kernels.h"

enum MdkDtype { MDK_F32 = 0, MDK_BF16 = 1, MDK_F16 = 2 };

struct MdkSparseKL {
  const void* logits;  // (rows, vocab), unit stride within a row
  int64_t row_stride;  // elements
  int64_t rows, vocab;
  int dtype;
  const int64_t* row_offsets;  // (rows + 1), or null: no targets
  const int32_t* token_ids;
  const void* probs;
  int probs_dtype;
  const int64_t* labels;  // (rows), or null
  int64_t ignore_index;
  float* kl;      // (rows) nats, or null
  float* ce;      // (rows) nats, or null
  double* lse;    // (rows) nats: written when grad_only == 0 (may be null), read when 1
  int grad_only;  // 1: lse is an input, kl and ce are not computed
  void* grad;     // null: forward only. May be the logits themselves.
  int64_t grad_stride;
  const float* kl_coef;  // (rows) d(total)/d(kl_row)
  const float* ce_coef;  // (rows) d(total)/d(ce_row)
};

struct MdkSlot {
  int32_t id;
  int32_t entry;
  uint32_t stamp;  // the row that filled it; anything else means empty
};

// Per-thread scratch of sparse_kl: a hash table that merges repeated ids, and the merged targets of
// the current row. The arrays hold the longest row, one label and a vector of slack.
struct MdkSparseKLScratch {
  MdkSlot* table;       // power-of-two slots, zeroed once
  uint32_t table_mask;  // slots - 1
  uint32_t stamp;       // last row number used
  int32_t* ids;
  float* probs;
  float* logits;
  float* work;
  int32_t* late_ids;  // the same of the row before, see LateRow
  float* late_work;
  float* kept;        // vocab + slack: exponentials of the current row
  float* references;  // one per block of the row, see online_lse.inl
};

struct MdkKnnTargets {
  const float* distances;    // (rows, neighbors) squared L2, unit stride within a row
  int64_t distance_stride;   // elements
  const void* neighbor_ids;  // (rows, neighbors), unit stride within a row; -1: not found
  int64_t id_stride;
  int narrow_ids;      // 1: int32, 0: int64
  const void* values;  // (num_values) token ids
  int64_t num_values;
  int narrow_values;
  const int64_t* exclude_ids;  // (rows), or null
  int64_t rows, neighbors;
  float scale;  // log2(e) / temperature, finite and positive
};

struct MdkTokenSlot {
  int32_t token;  // -1: empty
  int32_t entry;
};

// Per-thread scratch of knn_targets: arrays of `neighbors` elements and a vector of slack.
struct MdkKnnScratch {
  MdkTokenSlot* table;   // power-of-two slots, all empty between rows
  uint32_t table_shift;  // 32 - log2(slots)
  float* weights;        // of the neighbours
  int32_t* tokens;
  int32_t* entries;  // distinct tokens
  double* sums;      // and their weights
  int32_t* slots;    // of `table` in use
  int64_t* keys;     // (probability, token) packed to sort descending
  int64_t* sorted;
  int64_t fault_column;
  int64_t fault_value;
};

enum MdkKnnFault { MDK_KNN_ID = -1, MDK_KNN_DISTANCE = -2, MDK_KNN_TOKEN = -3 };

struct MdkKernels {
  const char* name;
  void (*sparse_kl)(const MdkSparseKL*, MdkSparseKLScratch*, int64_t row_begin, int64_t row_end);
  // One row to at most `neighbors` entries at `ids` and `probs`. Returns their number, or an
  // MdkKnnFault with its column and value in the scratch.
  int64_t (*knn_targets)(const MdkKnnTargets*, MdkKnnScratch*, int64_t row, int32_t* ids,
                         float* probs);
  void (*split_sum)(uint16_t* high, uint16_t* low, const uint16_t* product, int64_t n,
                    int low_known, int last);
  MdkMixKernels mix;
};

extern "C" {
extern const MdkKernels mdk_kernels_generic;
extern const MdkKernels mdk_kernels_avx2;
extern const MdkKernels mdk_kernels_avx512;
extern const MdkKernels mdk_kernels_avx512_bf16;
extern const MdkKernels mdk_kernels_neon;
}
