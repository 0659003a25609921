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

// floor(word / 256) of U * 2 W tokens from `token` (a multiple of 2 W) on, as exact
// floats in order.
#if defined(MDK_ISA_AVX512) || defined(MDK_ISA_AVX2)

#if defined(MDK_ISA_AVX512)
MDK_INLINE vi vset64(uint64_t x) { return _mm512_set1_epi64((int64_t)x); }
MDK_INLINE vi vmul_low32(vi a, vi b) { return _mm512_mul_epu32(a, b); }
MDK_INLINE vi vhigh32(vi a) { return _mm512_srli_epi64(a, 32); }
MDK_INLINE vi vxor3(vi a, vi b, vi c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
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
MDK_INLINE vi vxor3(vi a, vi b, vi c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
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

struct PhiloxStream {
  vi keys[kPhiloxRounds][2];
  vi offset[2];
  vi words;

  PhiloxStream(uint64_t seed, uint64_t position, uint32_t stream) {
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      keys[round][0] = vset64((uint32_t)seed + round * kPhiloxW0);
      keys[round][1] = vset64((uint32_t)(seed >> 32) + round * kPhiloxW1);
    }
    offset[0] = vset64((uint32_t)position);
    offset[1] = vset64(position >> 32);
    words = vset64(stream);
  }

  // Each 64-bit lane carries one 32-bit word of one block; what sits above it is never read. The U
  // sets of blocks advance in step: a round alone is a chain of dependent operations.
  template <int U>
  MDK_INLINE void high24(int64_t token, vf* out) const {
    const vi m0 = vset64(kPhiloxM0), m1 = vset64(kPhiloxM1);
    vi c0[U], c1[U], c2[U], c3[U], p0[U], p1[U];
    for (int u = 0; u < U; ++u) {
      c0[u] = philox_blocks((token + u * 2 * W) >> 2);
      c1[u] = words;
      c2[u] = offset[0];
      c3[u] = offset[1];
    }
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int u = 0; u < U; ++u) p0[u] = vmul_low32(c0[u], m0);
      for (int u = 0; u < U; ++u) p1[u] = vmul_low32(c2[u], m1);
      for (int u = 0; u < U; ++u) c0[u] = vxor3(vhigh32(p1[u]), c1[u], keys[round][0]);
      for (int u = 0; u < U; ++u) c2[u] = vxor3(vhigh32(p0[u]), c3[u], keys[round][1]);
      for (int u = 0; u < U; ++u) c1[u] = p1[u];
      for (int u = 0; u < U; ++u) c3[u] = p0[u];
    }
    for (int u = 0; u < U; ++u) {
      const vi first = vpair32(c0[u], c1[u]), second = vpair32(c2[u], c3[u]);
      out[2 * u] = vhigh24(vunpack_low(first, second));
      out[2 * u + 1] = vhigh24(vunpack_high(first, second));
    }
  }
};

#elif defined(MDK_ISA_NEON)

struct PhiloxStream {
  uint32_t key[2], offset[2], words;

  PhiloxStream(uint64_t seed, uint64_t position, uint32_t stream)
      : key{(uint32_t)seed, (uint32_t)(seed >> 32)},
        offset{(uint32_t)position, (uint32_t)(position >> 32)},
        words(stream) {}

  // A lane is a block, and a set of four blocks the words of 16 tokens.
  template <int U>
  MDK_INLINE void high24(int64_t token, vf* out) const {
    static_assert(U % 2 == 0, "in sets of four blocks");
    constexpr int S = U / 2;
    uint32x4_t c[S][4];
    const uint32x4_t lane = {0, 1, 2, 3};
    for (int s = 0; s < S; ++s) {
      c[s][0] = vaddq_u32(vdupq_n_u32((uint32_t)(token >> 2) + 4 * s), lane);
      c[s][1] = vdupq_n_u32(words);
      c[s][2] = vdupq_n_u32(offset[0]);
      c[s][3] = vdupq_n_u32(offset[1]);
    }
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int s = 0; s < S; ++s) {
        uint32x4_t low0, high0, low1, high1;
        multiply(c[s][0], kPhiloxM0, &low0, &high0);
        multiply(c[s][2], kPhiloxM1, &low1, &high1);
        c[s][0] = veorq_u32(veorq_u32(high1, c[s][1]), vdupq_n_u32(k0));
        c[s][2] = veorq_u32(veorq_u32(high0, c[s][3]), vdupq_n_u32(k1));
        c[s][1] = low1;
        c[s][3] = low0;
      }
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    for (int s = 0; s < S; ++s) {
      float32x4x4_t word;
      for (int i = 0; i < 4; ++i) word.val[i] = vcvtq_f32_u32(vshrq_n_u32(c[s][i], 8));
      float tokens[4 * W];
      vst4q_f32(tokens, word);  // interleaves the words of a block
      for (int i = 0; i < 4; ++i) out[4 * s + i] = vload(tokens + i * W);
    }
  }

 private:
  static MDK_INLINE void multiply(uint32x4_t a, uint32_t b, uint32x4_t* low, uint32x4_t* high) {
    const uint32x4_t p = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a), b));
    const uint32x4_t q = vreinterpretq_u32_u64(vmull_high_n_u32(a, b));
    *low = vuzp1q_u32(p, q);
    *high = vuzp2q_u32(p, q);
  }
};

#else

struct PhiloxStream {
  uint64_t seed, offset;
  uint32_t words;

  PhiloxStream(uint64_t s, uint64_t position, uint32_t stream)
      : seed(s), offset(position), words(stream) {}

  template <int U>
  MDK_INLINE void high24(int64_t token, vf* out) const {
    float s[U * 2 * W];
    for (int i = 0; i < U * 2 * W; ++i)
      s[i] = (float)(philox_word(seed, offset, words, token + i) >> 8);
    for (int u = 0; u < 2 * U; ++u) out[u] = vload(s + u * W);
  }
};

#endif
