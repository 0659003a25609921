// What the binding files share. They are compiled as one translation unit (CMakeLists.txt): most of
// the time that each takes is pybind11's own.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "checks.h"

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// None, or (what, row, value) of the first fault.
inline py::object report(const mdk::Fault& fault) {
  if (fault.what == nullptr) return py::none();
  return py::make_tuple(fault.what, fault.row, fault.value);
}
