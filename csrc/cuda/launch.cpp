#include "launch.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <string>

namespace mdk {

int64_t Arguments::integer() {
  if (next_ >= count_) throw std::invalid_argument("too few arguments");
  if (is_real_[next_])
    throw std::invalid_argument("argument " + std::to_string(next_) + " must be an int");
  return values_[next_++].integer;
}

double Arguments::real() {
  if (next_ >= count_) throw std::invalid_argument("too few arguments");
  const Value value = values_[next_];
  return is_real_[next_++] ? value.real : static_cast<double>(value.integer);
}

void Arguments::done() const {
  if (next_ != count_)
    throw std::invalid_argument("took " + std::to_string(next_) + " of " + std::to_string(count_) +
                                " arguments");
}

#ifndef MDK_HOST_SHIM

void fail(cudaError_t error) {
  cudaGetLastError();  // a launch error must not surface again in somebody else's call
  throw std::runtime_error(std::string("CUDA error ") + std::to_string(error) + " (" +
                           cudaGetErrorName(error) + "): " + cudaGetErrorString(error));
}

const Device& current_device() {
  static std::mutex mutex;
  static Device devices[64] = {};
  int index = 0;
  check(cudaGetDevice(&index));
  if (index >= 64) throw std::runtime_error("more than 64 devices");
  const std::lock_guard<std::mutex> lock(mutex);
  Device& device = devices[index];
  if (device.capability == 0) {
    const auto read = [index](cudaDeviceAttr attribute) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, attribute, index));
      return value;
    };
    device.multiprocessors = read(cudaDevAttrMultiProcessorCount);
    device.shared_per_block = read(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    device.shared_per_multiprocessor = read(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    device.capability =
        10 * read(cudaDevAttrComputeCapabilityMajor) + read(cudaDevAttrComputeCapabilityMinor);
  }
  return device;
}

void raise_shared_limit(const void* kernel, size_t bytes, size_t* known) {
  constexpr size_t kAlwaysAllowed = 48 * 1024;
  if (bytes <= kAlwaysAllowed) return;
  static std::mutex mutex;
  int index = 0;
  check(cudaGetDevice(&index));
  if (index >= 64) throw std::runtime_error("more than 64 devices");
  const std::lock_guard<std::mutex> lock(mutex);
  if (bytes <= known[index]) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
  // Else the driver may keep more of the memory as cache than leaves room for two blocks.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared));
  known[index] = bytes;
}

void start(const void* kernel, const Grid& grid, void** arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = grid.stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelExC(&config, kernel, arguments));
}

#endif

}  // namespace mdk
