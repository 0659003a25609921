// The table of translated kernels, filled by the sources that translate.py writes.
#pragma once
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

struct Kernel {
  void (*run)(const char* parameters);
  std::vector<std::pair<size_t, size_t>> parameters;  // (offset, bytes)
  int most_threads;                                   // what .maxntid says
};

std::unordered_map<std::string, Kernel>& kernels();

struct Register {
  Register(const char* name, Kernel kernel) { kernels()[name] = std::move(kernel); }
};

}  // namespace ptx
