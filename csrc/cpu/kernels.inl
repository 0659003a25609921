// The bodies of all ops, and the table that exports them as MDK_TABLE. Each kernels_<isa>.cpp
// selects an instruction set and includes this file; nothing else differs between them.
#include "vec.h"

namespace {
#include "knn_targets.inl"
#include "online_lse.inl"
#include "sparse_kl.inl"
}  // namespace

extern "C" const MdkKernels MDK_TABLE = {
    MDK_ISA_NAME,
    sparse_kl,
    knn_targets,
};
