// Philox4x32-10 (Salmon et al., SC'11), as mix_sample uses it: key = seed, counter = (token / 4,
// stream, offset low, offset high), word token % 4. Included inside an anonymous namespace.
#pragma once

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// The word of one token.
MDK_INLINE uint32_t philox_word(uint64_t seed, uint64_t offset, uint32_t stream, int64_t token) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  uint32_t c[4] = {(uint32_t)(token >> 2), stream, (uint32_t)offset, (uint32_t)(offset >> 32)};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = (uint64_t)c[0] * kPhiloxM0, p1 = (uint64_t)c[2] * kPhiloxM1;
    const uint32_t c0 = (uint32_t)(p1 >> 32) ^ c[1] ^ k0, c2 = (uint32_t)(p0 >> 32) ^ c[3] ^ k1;
    c[0] = c0;
    c[1] = (uint32_t)p1;
    c[2] = c2;
    c[3] = (uint32_t)p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c[token & 3];
}

// floor(word / 256) of 2 W tokens from `token` (a multiple of 2 W) on, stream 0, as exact floats.
#if defined(MDK_ISA_AVX512) || defined(MDK_ISA_AVX2)

#if defined(MDK_ISA_AVX512)
MDK_INLINE vi vset64(uint64_t x) { return _mm512_set1_epi64((int64_t)x); }
MDK_INLINE vi vmul_low32(vi a, vi b) { return _mm512_mul_epu32(a, b); }
MDK_INLINE vi vhigh32(vi a) { return _mm512_srli_epi64(a, 32); }
MDK_INLINE vi vxor(vi a, vi b) { return _mm512_xor_si512(a, b); }
// Lane order: after the unpacking below, the first output vector holds blocks 0-3, in order.
MDK_INLINE vi philox_blocks(int64_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
}
MDK_INLINE vi vpair32(vi low, vi high) {  // low 32 bits of both, in each 64-bit lane
  return _mm512_mask_blend_epi32(0xAAAA, low, _mm512_slli_epi64(high, 32));
}
MDK_INLINE vi vunpack_low(vi a, vi b) { return _mm512_unpacklo_epi64(a, b); }
MDK_INLINE vi vunpack_high(vi a, vi b) { return _mm512_unpackhi_epi64(a, b); }
MDK_INLINE vf vhigh24(vi a) { return _mm512_cvtepi32_ps(_mm512_srli_epi32(a, 8)); }
#else
MDK_INLINE vi vset64(uint64_t x) { return _mm256_set1_epi64x((int64_t)x); }
MDK_INLINE vi vmul_low32(vi a, vi b) { return _mm256_mul_epu32(a, b); }
MDK_INLINE vi vhigh32(vi a) { return _mm256_srli_epi64(a, 32); }
MDK_INLINE vi vxor(vi a, vi b) { return _mm256_xor_si256(a, b); }
MDK_INLINE vi philox_blocks(int64_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_set_epi64x(3, 1, 2, 0));
}
MDK_INLINE vi vpair32(vi low, vi high) {
  return _mm256_blend_epi32(low, _mm256_slli_epi64(high, 32), 0xAA);
}
MDK_INLINE vi vunpack_low(vi a, vi b) { return _mm256_unpacklo_epi64(a, b); }
MDK_INLINE vi vunpack_high(vi a, vi b) { return _mm256_unpackhi_epi64(a, b); }
MDK_INLINE vf vhigh24(vi a) { return _mm256_cvtepi32_ps(_mm256_srli_epi32(a, 8)); }
#endif

// Each 64-bit lane carries one 32-bit word of one block; what sits above it is never read.
MDK_INLINE void philox_high24(uint64_t seed, uint64_t offset, int64_t token, vf* a, vf* b) {
  const vi m0 = vset64(kPhiloxM0), m1 = vset64(kPhiloxM1);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  vi c0 = philox_blocks(token >> 2), c1 = vset64(0);
  vi c2 = vset64((uint32_t)offset), c3 = vset64(offset >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const vi p0 = vmul_low32(c0, m0), p1 = vmul_low32(c2, m1);
    c0 = vxor(vxor(vhigh32(p1), c1), vset64(k0));
    c2 = vxor(vxor(vhigh32(p0), c3), vset64(k1));
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  const vi first = vpair32(c0, c1), second = vpair32(c2, c3);
  *a = vhigh24(vunpack_low(first, second));
  *b = vhigh24(vunpack_high(first, second));
}

#else

MDK_INLINE void philox_high24(uint64_t seed, uint64_t offset, int64_t token, vf* a, vf* b) {
  float s[2 * W];
  for (int i = 0; i < 2 * W; ++i) s[i] = (float)(philox_word(seed, offset, 0, token + i) >> 8);
  *a = vload(s);
  *b = vload(s + W);
}

#endif
