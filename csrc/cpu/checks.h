// Result of a validation that runs before any output is touched. Python turns it into the message,
// since it knows the argument names.
#pragma once
#include <cstdint>

namespace mdk {

struct Fault {
  const char* what;  // null: none
  int64_t row;
  int64_t value;
};

constexpr Fault no_fault{nullptr, 0, 0};

}  // namespace mdk
