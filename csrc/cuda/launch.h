// The host side of an operator: arguments from Python, what the device can do, starting a kernel.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef MDK_HOST_SHIM
#include "launch_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace mdk {

// Positional arguments of an operator as Python passed them, read in order. Every operator's first
// two are the device index and the stream, which the binding takes.
class Arguments {
 public:
  union Value {
    int64_t integer;
    double real;
  };
  Arguments(const Value* values, const bool* is_real, int count, cudaStream_t stream)
      : stream(stream), values_(values), is_real_(is_real), count_(count) {}

  int64_t integer();
  double real();
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(integer()));
  }
  void done() const;  // throws unless all arguments were read

  const cudaStream_t stream;

 private:
  const Value* values_;
  const bool* is_real_;
  int count_, next_ = 0;
};

struct Device {
  int capability;  // 10 * major + minor
  int multiprocessors;
  int shared_per_block;  // bytes a block can ask for
  int shared_per_multiprocessor;
};
constexpr int kSharedReserved = 1024;  // bytes the driver takes per block

const Device& current_device();

[[noreturn]] void fail(cudaError_t error);  // RuntimeError; the binding adds the operator's name

inline void check(cudaError_t error) {
  if (error != cudaSuccess) fail(error);
}

struct Grid {
  int64_t blocks;  // a multiple of cluster, at most kMostGridBlocks
  int threads;     // a multiple of 32
  int cluster = 1;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};
// Kernels loop from block_index() in steps of block_count(), so a grid can stay below this.
#ifdef MDK_HOST_SHIM
constexpr int64_t kMostGridBlocks = 8;  // so that blocks of a test take several rows
#else
constexpr int64_t kMostGridBlocks = int64_t{1} << 30;
#endif

#ifdef MDK_HOST_SHIM
void check_grid(const Grid& grid);

template <auto kKernel, class... P>
void launch(const Grid& grid, P... arguments) {
  check_grid(grid);
  shim::run_grid(grid.blocks, grid.cluster, grid.threads, grid.shared_bytes,
                 [&] { kKernel(arguments...); });
}
#else
void raise_shared_limit(const void* kernel, size_t bytes, size_t* known);
void start(const void* kernel, const Grid& grid, void** arguments);

// launch<kernel>(grid, arguments...): types as the kernel declares them.
template <auto kKernel, class... P>
void launch(const Grid& grid, P... arguments) {
  static size_t known[64] = {};  // dynamic shared memory this kernel may use, per device
  void* pointers[] = {&arguments...};
  const void* kernel = reinterpret_cast<const void*>(kKernel);
  raise_shared_limit(kernel, grid.shared_bytes, known);
  start(kernel, grid, pointers);
}
#endif

}  // namespace mdk
