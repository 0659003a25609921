// The Python face of knn_targets. Pointers arrive as integers, as in bindings.cpp.
#include <memory>

#include "bind.h"
#include "knn_targets_driver.h"

namespace {

// KnnRows, or (what, row, value) of the first fault.
py::object knn_targets(uintptr_t distances, int64_t distance_stride, uintptr_t neighbor_ids,
                       int64_t id_stride, bool narrow_ids, uintptr_t values, int64_t num_values,
                       bool narrow_values, uintptr_t exclude_ids, int64_t rows, int64_t neighbors,
                       double scale, int threads) {
  const MdkKnnTargets args = {pointer<float>(distances),
                              distance_stride,
                              pointer<void>(neighbor_ids),
                              id_stride,
                              narrow_ids,
                              pointer<void>(values),
                              num_values,
                              narrow_values,
                              pointer<int64_t>(exclude_ids),
                              rows,
                              neighbors,
                              static_cast<float>(scale)};
  auto result = std::make_unique<mdk::KnnRows>();
  mdk::Fault fault;
  {
    py::gil_scoped_release release;
    fault = result->run(args, threads);
  }
  if (fault.what != nullptr) return py::make_tuple(fault.what, fault.row, fault.value);
  return py::cast(std::move(result));
}

void copy_to(const mdk::KnnRows& rows, uintptr_t row_offsets, uintptr_t token_ids,
             uintptr_t probs) {
  py::gil_scoped_release release;
  rows.copy_to(pointer<int64_t>(row_offsets), pointer<int32_t>(token_ids), pointer<float>(probs));
}

}  // namespace

void bind_knn_targets(py::module_& m) {
  py::class_<mdk::KnnRows>(m, "KnnRows")
      .def_property_readonly("nnz", &mdk::KnnRows::nnz)
      .def("copy_to", &copy_to);
  m.def("knn_targets", &knn_targets);
}
