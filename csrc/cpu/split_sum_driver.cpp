#include "split_sum_driver.h"

#include "isa.h"
#include "parallel.h"

namespace mdk {
namespace {

constexpr int64_t kChunk = 1 << 16;  // elements

}  // namespace

void split_sum(uint16_t* high, uint16_t* low, const uint16_t* product, int64_t n, bool low_known,
               bool last, int threads) {
  const auto body = kernels().split_sum;
  parallel_rows(n, threads, kChunk, [&](int, int64_t begin, int64_t end) {
    body(high + begin, low == nullptr ? nullptr : low + begin, product + begin, end - begin,
         low_known, last);
  });
}

}  // namespace mdk
