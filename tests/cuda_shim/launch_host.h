// What csrc/cuda/launch.h and bindings.cpp take from the CUDA runtime, on the host.
#pragma once
#include <cstddef>
#include <cstdint>

#include "fibers.h"

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
