#pragma once
#include "checks.h"
#include "kernels.h"

namespace mdk {

// Validates offsets, ids and labels, then runs the kernel over threads. On a fault nothing has been
// written.
Fault sparse_kl(const MdkSparseKL& args, int64_t nnz, int threads);

}  // namespace mdk
