// The part of DLPack's C ABI, major version 1, that plain_bind.cpp reads: what a tensor of another
// library looks like, and the table of functions that its type offers as
// __dlpack_c_exchange_api__.
#pragma once
#include <cstdint>

namespace mdk::dlpack {

constexpr uint32_t kMajor = 1;
enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kFloat = 2, kBfloat = 4 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* owner_from_object;
  void* object_from_owner;
  // A view that owns nothing; -1 with a Python exception set where there is none. May be null.
  int (*view_of_object)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace mdk::dlpack
