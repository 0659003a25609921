#pragma once
#include <cstdint>

namespace mdk {

// split_sum.inl over threads. `high`, `low` and `product` are (n), contiguous; `low` may be null if
// it is neither known nor wanted.
void split_sum(uint16_t* high, uint16_t* low, const uint16_t* product, int64_t n, bool low_known,
               bool last, int threads);

}  // namespace mdk
