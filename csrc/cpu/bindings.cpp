// The Python face of the CPU kernels. Pointers arrive as integers: Python has already checked
// device, dtype, strides and storage size, and allocates every output.
#include "bind.h"
#include "isa.h"
#include "parallel.h"
#include "sparse_kl_driver.h"
#include "split_sum_driver.h"

void bind_mix(py::module_& m);  // mix_bind.cpp

void bind_knn_targets(py::module_& m);  // knn_targets_bind.cpp

void bind_plain(py::module_& m);  // plain_bind.cpp

namespace {

py::object sparse_kl(uintptr_t logits, int64_t row_stride, int64_t rows, int64_t vocab, int dtype,
                     uintptr_t row_offsets, uintptr_t token_ids, uintptr_t probs, int probs_dtype,
                     int64_t nnz, uintptr_t labels, int64_t ignore_index, uintptr_t kl,
                     uintptr_t ce, uintptr_t lse, bool grad_only, uintptr_t grad,
                     int64_t grad_stride, uintptr_t kl_coef, uintptr_t ce_coef, double kl_weight,
                     bool mean, uintptr_t total_loss, uintptr_t total_kl, uintptr_t total_ce,
                     int threads) {
  const MdkSparseKL args = {pointer<void>(logits),
                            row_stride,
                            rows,
                            vocab,
                            dtype,
                            pointer<int64_t>(row_offsets),
                            pointer<int32_t>(token_ids),
                            pointer<void>(probs),
                            probs_dtype,
                            pointer<int64_t>(labels),
                            ignore_index,
                            pointer<float>(kl),
                            pointer<float>(ce),
                            pointer<double>(lse),
                            grad_only,
                            pointer<void>(grad),
                            grad_stride,
                            pointer<float>(kl_coef),
                            pointer<float>(ce_coef)};
  const mdk::SparseKLReduction reduction = {kl_weight, mean, pointer<float>(total_loss),
                                            pointer<float>(total_kl), pointer<float>(total_ce)};
  mdk::Fault fault;
  {
    py::gil_scoped_release release;
    fault = mdk::sparse_kl(args, reduction, nnz, threads);
  }
  return report(fault);
}

void split_sum(uintptr_t high, uintptr_t low, uintptr_t product, int64_t n, bool low_known,
               bool last, int threads) {
  const py::gil_scoped_release release;
  mdk::split_sum(pointer<uint16_t>(high), pointer<uint16_t>(low), pointer<uint16_t>(product), n,
                 low_known, last, threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of mdkernels (no libtorch inside)";
  m.def("isa", [] { return std::string(mdk::kernels().name); });
  m.def("set_isa", &mdk::set_isa);
  m.def("compiled_isas", &mdk::compiled_isas);
  m.def("supported_isas", &mdk::supported_isas);
  m.def("after_fork", &mdk::after_fork);
  m.attr("openmp") = mdk_has_openmp;
  m.def("advise_huge_pages",
        [](uintptr_t data, int64_t bytes) { mdk::advise_huge_pages(pointer<void>(data), bytes); });
  m.def("sparse_kl", &sparse_kl);
  m.def("split_sum", &split_sum);
  bind_mix(m);
  bind_knn_targets(m);
  bind_plain(m);
}
