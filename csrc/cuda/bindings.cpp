// The Python face of the CUDA kernels. An operator is a function of (device index, stream, then
// whatever its launcher passes): numbers only, pointers as integers. Python has already checked
// device, dtype, strides and storage size, and allocates every output.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

#ifndef MDK_ARCHITECTURES
#define MDK_ARCHITECTURES "host"
#endif

namespace py = pybind11;

namespace mdk {

using Operator = void (*)(Arguments&);

// One declaration and one line of kOperators per operator; each is defined in its <op>.cu.
void sparse_kl(Arguments&);
void sparse_kl_coefs(Arguments&);
void sparse_kl_sums(Arguments&);
void scale_rows(Arguments&);
void token_logprobs(Arguments&);
void logit_mix(Arguments&);
void mix_argmax(Arguments&);
void mix_sample(Arguments&);
void mix_logprobs(Arguments&);
void mix_choose(Arguments&);
void mix_verify(Arguments&);
void knn_targets_merge(Arguments&);
void knn_targets_pack(Arguments&);

struct Entry {
  const char* name;
  Operator run;
};
// clang-format off
constexpr Entry kOperators[] = {
    {"sparse_kl", sparse_kl},
    {"sparse_kl_coefs", sparse_kl_coefs},
    {"sparse_kl_sums", sparse_kl_sums},
    {"scale_rows", scale_rows},
    {"token_logprobs", token_logprobs},
    {"logit_mix", logit_mix},
    {"mix_argmax", mix_argmax},
    {"mix_sample", mix_sample},
    {"mix_logprobs", mix_logprobs},
    {"mix_choose", mix_choose},
    {"mix_verify", mix_verify},
    {"knn_targets_merge", knn_targets_merge},
    {"knn_targets_pack", knn_targets_pack},
};
// clang-format on

namespace {

class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    check(cudaGetDevice(&before_));
    if (index != before_) check(cudaSetDevice(index));
    changed_ = index != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

void call(const Entry& op, const py::args& args) {
  std::vector<Arguments::Value> values(args.size());
  const std::unique_ptr<bool[]> is_real(new bool[args.size()]);
  for (size_t i = 0; i < args.size(); ++i) {
    const py::handle item = args[i];
    is_real[i] = PyFloat_Check(item.ptr());
    if (is_real[i])
      values[i].real = item.cast<double>();
    else if (PyLong_Check(item.ptr()) && item.cast<py::int_>() < py::int_(0))
      values[i].integer = item.cast<int64_t>();
    else  // addresses and streams may have the top bit set
      values[i].integer = static_cast<int64_t>(item.cast<uint64_t>());
  }
  if (args.size() < 2) throw std::invalid_argument("expected a device index and a stream first");
  const auto stream = reinterpret_cast<cudaStream_t>(static_cast<uintptr_t>(values[1].integer));
  Arguments arguments(values.data() + 2, is_real.get() + 2, static_cast<int>(args.size()) - 2,
                      stream);
  py::gil_scoped_release release;
  try {
    const DeviceGuard guard(static_cast<int>(values[0].integer));
    op.run(arguments);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(op.name) + ": " + error.what());
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(op.name) + ": " + error.what());
  }
}

// Number of devices; without a driver, the error that says so.
int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count));
  return count;
}

py::dict device(int index) {
  const DeviceGuard guard(index);
  const Device& d = current_device();
  py::dict out;
  out["capability"] = d.capability;
  out["multiprocessors"] = d.multiprocessors;
  out["shared_per_block"] = d.shared_per_block;
  out["shared_per_multiprocessor"] = d.shared_per_multiprocessor;
  return out;
}

}  // namespace
}  // namespace mdk

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of mdkernels (no libtorch inside)";
  for (const mdk::Entry& op : mdk::kOperators)
    m.def(op.name, [&op](const py::args& args) { mdk::call(op, args); });
  m.def("device_count", &mdk::device_count);
  m.def("device", &mdk::device);
  m.attr("architectures") = MDK_ARCHITECTURES;
}
