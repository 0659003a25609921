// The shortcut of a decode-sized call: what the launchers of the mixture have to know of ordinary
// tensors, by one native call instead of some forty attribute lookups, which take longer than the
// kernel on a row of 50257. Anything else is left to Python, which knows why.
#include <algorithm>
#include <cstdlib>

#include "bind.h"
#include "dlpack.h"
#include "kernels.h"

namespace {

using mdk::dlpack::ExchangeApi;
using View = mdk::dlpack::Tensor;

PyTypeObject* tensor_type = nullptr;
const ExchangeApi* api = nullptr;

// False if the exchange table is not one of those known here.
bool accept_tensors(const py::type& type, const py::handle& table) {
  constexpr const char* name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(table.ptr(), name)) return false;
  const auto* found = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(table.ptr(), name));
  if (found->major != mdk::dlpack::kMajor || found->view_of_object == nullptr) return false;
  api = found;
  tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
  return true;
}

// Whoever cannot answer is not ordinary; but an interrupt is not an answer.
void forget_error() {
  if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
  PyErr_Clear();
}

PyObject* call(PyObject* object, PyObject* method) {  // a new reference, or null
  PyObject* const result = PyObject_CallMethodNoArgs(object, method);
  if (result == nullptr) forget_error();
  return result;
}

int64_t call_integer(PyObject* object, PyObject* method) {  // -1: none
  PyObject* const result = call(object, method);
  if (result == nullptr) return -1;
  const int64_t value = PyLong_AsLongLong(result);
  Py_DECREF(result);
  if (PyErr_Occurred()) forget_error();
  return value;
}

bool is_false(PyObject* result) {  // steals the reference
  if (result == nullptr && PyErr_Occurred()) forget_error();
  Py_XDECREF(result);
  return result == Py_False;
}

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

// Whether the storage still holds the view: FSDP frees it behind a tensor's back.
bool storage_covers(PyObject* object, const View& view) {
  static PyObject* const untyped_storage = name("untyped_storage");
  static PyObject* const nbytes = name("nbytes");
  static PyObject* const storage_offset = name("storage_offset");
  PyObject* const storage = call(object, untyped_storage);
  if (storage == nullptr) return false;
  const int64_t bytes = call_integer(storage, nbytes);
  Py_DECREF(storage);
  const int64_t offset = call_integer(object, storage_offset);
  const int64_t last =
      (view.shape[0] - 1) * view.strides[0] + (view.shape[1] - 1) * view.strides[1];
  return offset >= 0 && (offset + last + 1) * (view.bits / 8) <= bytes;
}

// A non-empty matrix of logits with unit stride within a row whose memory holds its values.
bool plain_matrix(PyObject* object, bool recording, View* view) {
  if (Py_TYPE(object) != tensor_type) return false;
  if (api->view_of_object(object, view) != 0) {
    forget_error();
    return false;
  }
  if (view->ndim != 2 || view->data == nullptr || view->lanes != 1 || view->strides == nullptr ||
      view->shape[0] < 1 || view->shape[1] < 1 || (view->strides[1] != 1 && view->shape[1] != 1))
    return false;
  static PyObject* const is_neg = name("is_neg");
  static PyObject* const requires_grad = name("requires_grad");
  return is_false(call(object, is_neg)) &&
         !(recording && !is_false(PyObject_GetAttr(object, requires_grad))) &&
         storage_covers(object, *view);
}

int dtype_of(const View& view) {  // an MdkDtype, or -1
  if (view.code == mdk::dlpack::kBfloat && view.bits == 16) return MDK_BF16;
  if (view.code != mdk::dlpack::kFloat) return -1;
  return view.bits == 32 ? MDK_F32 : view.bits == 16 ? MDK_F16 : -1;
}

// `list[0]` of a list or tuple of one, else the object itself.
PyObject* only(PyObject* object) {
  const bool one = (PyList_CheckExact(object) && PyList_GET_SIZE(object) == 1) ||
                   (PyTuple_CheckExact(object) && PyTuple_GET_SIZE(object) == 1);
  return one ? PySequence_Fast_GET_ITEM(object, 0) : object;
}

// (device type, rows, width, inputs, weights, memory) of a base and one memory with one number as
// weight, inputs and weights as mix_bind.cpp takes them; None for anything that is not ordinary.
// The memory tensor is there to be kept: another thread may empty the list that it came in.
py::object plain_mixture(const py::handle& base, const py::handle& memory, const py::handle& weight,
                         bool recording) {
  const char* named = std::getenv("MDK_BACKEND");
  if (api == nullptr || (named != nullptr && *named != 0)) return py::none();
  PyObject* const share = only(weight.ptr());
  if (!PyFloat_CheckExact(share)) return py::none();
  const double w = PyFloat_AS_DOUBLE(share);
  const auto other = py::reinterpret_borrow<py::object>(only(memory.ptr()));
  View a, b;
  if (!(w >= 0.0 && w <= 1.0) || !plain_matrix(base.ptr(), recording, &a) ||
      !plain_matrix(other.ptr(), recording, &b))
    return py::none();
  const int first = dtype_of(a), second = dtype_of(b);
  if (first < 0 || second < 0 || a.shape[0] != b.shape[0] || a.device_type != b.device_type ||
      a.device_id != b.device_id)
    return py::none();
  const char* device = a.device_type == mdk::dlpack::kCpu    ? "cpu"
                       : a.device_type == mdk::dlpack::kCuda ? "cuda"
                                                             : nullptr;
  if (device == nullptr) return py::none();
  const auto input = [](const View& view, int dtype) {
    return py::make_tuple(reinterpret_cast<uintptr_t>(view.data) + view.byte_offset,
                          view.strides[0], view.shape[1], dtype);
  };
  return py::make_tuple(device, a.shape[0], std::max(a.shape[1], b.shape[1]),
                        py::make_tuple(input(a, first), input(b, second)),
                        py::make_tuple(1.0 - w, w), other);
}

}  // namespace

void bind_plain(py::module_& m) {
  m.def("accept_tensors", &accept_tensors);
  m.def("plain_mixture", &plain_mixture);
}
