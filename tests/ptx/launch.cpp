// The table of kernels, and a launch by name for kernels whose launcher is not the CUDA runtime.
#include <exception>

#include "fibers.h"
#include "table.h"

namespace ptx {

std::unordered_map<std::string, Kernel>& kernels() {
  static std::unordered_map<std::string, Kernel> all;
  return all;
}

}  // namespace ptx

// Runs a grid; nullptr, or what is wrong with it.
extern "C" const char* ptx_launch(const char* name, int64_t blocks, int threads, size_t shared,
                                  const char* parameters) {
  static std::string error;
  const auto kernel = ptx::kernels().find(name);
  if (kernel == ptx::kernels().end()) return "no such kernel";
  if (threads > kernel->second.most_threads) return "more threads than the kernel is compiled for";
  try {
    mdk::shim::run_grid(blocks, 1, threads, shared, [&] { kernel->second.run(parameters); });
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  return nullptr;
}
