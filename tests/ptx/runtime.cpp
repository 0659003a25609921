// As much of the CUDA runtime as the extension _cuda calls, over kernels translated from PTX: the
// objects of the package's own build are linked against this file instead of libcudart, so the
// launches and their attributes are the real ones too. What a device refuses is an error here.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fibers.h"
#include "table.h"

namespace ptx {

namespace {

struct Function {
  std::string name;
  size_t most_shared = 48 * 1024;
};

std::unordered_map<const void*, Function>& functions() {
  static std::unordered_map<const void*, Function> all;
  return all;
}

// MDK_SHIM_DEVICE=capability,multiprocessors,shared bytes per block, as in the host shim.
struct Device {
  int capability = 90, multiprocessors = 4, shared = 232448;
  Device() {
    if (const char* text = std::getenv("MDK_SHIM_DEVICE"); text && *text)
      std::sscanf(text, "%d,%d,%d", &capability, &multiprocessors, &shared);
  }
};

}  // namespace
}  // namespace ptx

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  ptx::functions()[host] = {name};
}
// Only <<<...>>> comes here, which the package does not use.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  std::abort();
}

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "refused by tests/ptx/runtime.cpp"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const ptx::Device device;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared + 1024;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.capability / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.capability % 10;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  const auto found = ptx::functions().find(host);
  if (found == ptx::functions().end()) return cudaErrorInvalidDeviceFunction;
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > ptx::Device().shared) return cudaErrorInvalidValue;
    found->second.most_shared = static_cast<size_t>(value);
  }
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host,
                                void** arguments) {
  const auto found = ptx::functions().find(host);
  if (found == ptx::functions().end()) return cudaErrorInvalidDeviceFunction;
  const auto kernel = ptx::kernels().find(found->second.name);
  if (kernel == ptx::kernels().end()) return cudaErrorNoKernelImageForDevice;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeClusterDimension) return cudaErrorInvalidValue;
    cluster = config->attrs[i].val.clusterDim.x;
  }
  const dim3 grid = config->gridDim, block = config->blockDim;
  const bool good = grid.x > 0 && grid.x <= INT32_MAX && grid.y == 1 && grid.z == 1 &&
                    block.x > 0 && block.x % 32 == 0 && block.y == 1 && block.z == 1 &&
                    static_cast<int>(block.x) <= kernel->second.most_threads && cluster >= 1 &&
                    cluster <= (ptx::Device().capability >= 90 ? 8u : 1u) &&
                    grid.x % cluster == 0 && config->dynamicSmemBytes <= found->second.most_shared;
  if (!good) return cudaErrorInvalidConfiguration;
  size_t bytes = 0;
  for (const auto& [offset, size] : kernel->second.parameters) bytes = offset + size;
  if (bytes > 4096) return cudaErrorInvalidValue;
  alignas(16) char parameters[4096];
  std::memset(parameters, 0xff, sizeof parameters);
  for (size_t i = 0; i < kernel->second.parameters.size(); ++i)
    std::memcpy(parameters + kernel->second.parameters[i].first, arguments[i],
                kernel->second.parameters[i].second);
  mdk::shim::run_grid(grid.x, static_cast<int>(cluster), static_cast<int>(block.x),
                      config->dynamicSmemBytes, [&] { kernel->second.run(parameters); });
  return cudaSuccess;
}

}  // extern "C"
