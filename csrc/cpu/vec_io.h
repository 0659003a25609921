// Loads and stores of 2 W elements as two vectors; included inside vec.h's anonymous namespace.
//
// For bf16 the pair holds the even and the odd elements (a shift and a mask instead of a shuffle);
// for the other types the first and the second half. Element-wise work and reductions do not care,
// and store2 undoes what load2 did. Nothing may assume that lane i is element i.
#pragma once

MDK_INLINE void load2(const float* p, vf* a, vf* b) {
  *a = vload(p);
  *b = vload(p + W);
}
MDK_INLINE void store2(float* p, vf a, vf b) {
  vstore(p, a);
  vstore(p + W, b);
}

#if defined(MDK_ISA_AVX512)

MDK_INLINE void load2(const bf16_t* p, vf* a, vf* b) {
  const vi x = _mm512_loadu_si512(p);
  *a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  *b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
}
#if defined(MDK_ISA_AVX512_BF16)
MDK_INLINE void store2(bf16_t* p, vf a, vf b) {
  // The instruction concatenates [a, b]; the permutation interleaves them again. It rounds to
  // nearest even, keeps NaN and flushes subnormals.
  const vi packed = (vi)_mm512_cvtne2ps_pbh(b, a);
  const vi order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                    23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, packed));
}
#else
MDK_INLINE vi vround_bf16(vf x) {  // the rounded bf16 in the upper half of each lane
  const vi bits = _mm512_castps_si512(x);
  const vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const vi rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const vi quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
}
MDK_INLINE void store2(bf16_t* p, vf a, vf b) {
  const vi low = _mm512_srli_epi32(vround_bf16(a), 16);
  const vi high = _mm512_and_si512(vround_bf16(b), _mm512_set1_epi32((int)0xffff0000));
  _mm512_storeu_si512(p, _mm512_or_si512(low, high));
}
#endif
MDK_INLINE void load2(const f16_t* p, vf* a, vf* b) {
  *a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  *b = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + W)));
}
MDK_INLINE void store2(f16_t* p, vf a, vf b) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, mode));
  _mm256_storeu_si256((__m256i*)(p + W), _mm512_cvtps_ph(b, mode));
}

#elif defined(MDK_ISA_AVX2)

MDK_INLINE void load2(const bf16_t* p, vf* a, vf* b) {
  const vi x = _mm256_loadu_si256((const __m256i*)p);
  *a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  *b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000)));
}
// The rounded bf16 in the upper half of each lane. For what a kernel stores: of the NaNs only some
// that no arithmetic makes could overflow here, and a row with NaN logits is filled with the
// default.
MDK_INLINE vi vround_bf16(vf x) {
  const vi bits = _mm256_castps_si256(x);
  const vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
MDK_INLINE void store2(bf16_t* p, vf a, vf b) {
  const vi low = _mm256_srli_epi32(vround_bf16(a), 16);
  _mm256_storeu_si256((__m256i*)p, _mm256_blend_epi16(low, vround_bf16(b), 0xaa));
}
MDK_INLINE void load2(const f16_t* p, vf* a, vf* b) {
  *a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  *b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + W)));
}
MDK_INLINE void store2(f16_t* p, vf a, vf b) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, mode));
  _mm_storeu_si128((__m128i*)(p + W), _mm256_cvtps_ph(b, mode));
}

#else

template <class T>
MDK_INLINE void load2(const T* p, vf* a, vf* b) {
  float s[2 * W];
  for (int i = 0; i < 2 * W; ++i) s[i] = to_float(p[i]);
  load2(s, a, b);
}
template <class T>
MDK_INLINE void store2(T* p, vf a, vf b) {
  float s[2 * W];
  store2(s, a, b);
  for (int i = 0; i < 2 * W; ++i) from_float(s[i], p + i);
}

#endif

// The last n < 2 W elements of a row, padded with `pad`.
template <class T>
MDK_INLINE void load2_tail(const T* p, int64_t n, float pad, vf* a, vf* b) {
  T s[2 * W];
  for (int i = 0; i < 2 * W; ++i) {
    if (i < n)
      s[i] = p[i];
    else
      from_float(pad, s + i);
  }
  load2(s, a, b);
}
template <class T>
MDK_INLINE void store2_tail(T* p, int64_t n, vf a, vf b) {
  T s[2 * W];
  store2(s, a, b);
  for (int i = 0; i < n; ++i) p[i] = s[i];
}
