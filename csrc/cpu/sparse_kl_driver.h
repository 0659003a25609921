#pragma once
#include "checks.h"
#include "kernels.h"

namespace mdk {

// Used where the caller has no factor of his own for every row: all rows get `kl_weight` and what
// it leaves of 1, over the number of rows that count (at least 1) if `mean`. The totals, sums or
// means over the rows in nats, are written where they are wanted.
struct SparseKLReduction {
  double kl_weight;
  bool mean;
  float *loss, *kl, *ce;  // or null
};

// Validates offsets, ids and labels, then runs the kernel over threads. On a fault nothing has been
// written.
Fault sparse_kl(MdkSparseKL args, const SparseKLReduction& reduction, int64_t nnz, int threads);

}  // namespace mdk
