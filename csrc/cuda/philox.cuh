// Philox4x32-10 (Salmon et al., SC'11) as mix_sample uses it; the layout is fixed in
// mdkernels/ops/mix_sample/README.md.
#pragma once
#include <math.h>

#include "device.cuh"

namespace mdk {

struct PhiloxWords {
  unsigned word[4];
};

// The words of tokens [4 block, 4 block + 4).
__device__ __forceinline__ PhiloxWords philox(uint64_t seed, uint64_t offset, unsigned stream,
                                              unsigned block) {
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
  unsigned c0 = block, c1 = stream;
  unsigned c2 = static_cast<unsigned>(offset), c3 = static_cast<unsigned>(offset >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<unsigned>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<unsigned>(p1);
    c2 = static_cast<unsigned>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<unsigned>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// E = -log(1 - v) for the 64-bit v = (high + (low + 1/2) / 2^32) / 2^32, clipped below 1.
__device__ __forceinline__ double race_exponential(unsigned high, unsigned low) {
  const double v = (high + (low + 0.5) * 0x1p-32) * 0x1p-32;
  return -log1p(-(v < 1.0 - 0x1p-53 ? v : 1.0 - 0x1p-53));
}

}  // namespace mdk
