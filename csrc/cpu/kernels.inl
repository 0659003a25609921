// The bodies of all ops, and the table that exports them as MDK_TABLE. Each kernels_<isa>.cpp
// selects an instruction set and includes this file; nothing else differs between them.
#include "vec.h"

namespace {
// clang-format off: each builds on the ones before it.
#include "knn_targets.inl"
#include "online_lse.inl"
#include "sparse_kl.inl"
#include "split_sum.inl"
#include "mix_common.inl"
#include "logit_mix.inl"
#include "mix_argmax.inl"
#include "philox.inl"
#include "mix_sample.inl"
#include "mix_verify.inl"
// clang-format on
}  // namespace

extern "C" const MdkKernels MDK_TABLE = {
    MDK_ISA_NAME,
    sparse_kl,
    knn_targets,
    split_sum,
    {mix_sums, mix_write, mix_best, mix_group_max, mix_collect, mix_mass_above, mix_race,
     mix_residual, mix_exponential, W},
};
