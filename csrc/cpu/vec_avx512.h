// AVX-512 (F, BW, DQ, VL), with MDK_ISA_AVX512_BF16 also BF16. Included inside vec.h's anonymous
// namespace.
#pragma once

typedef __m512 vf;
typedef __m512i vi;
constexpr int W = 16;
constexpr bool kFused = true;
MDK_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
MDK_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
MDK_INLINE void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
MDK_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
MDK_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
MDK_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
MDK_INLINE vf vat_least(vf low, vf x) { return vmax(low, x); }
MDK_INLINE vf vat_most(vf high, vf x) { return vmin(high, x); }
MDK_INLINE float vhsum(vf x) { return _mm512_reduce_add_ps(x); }
MDK_INLINE float vhmax(vf x) { return _mm512_reduce_max_ps(x); }
// t = floor(t) + f. vscalef takes the floor itself, saturates and underflows as 2^t would, and
// keeps NaN.
MDK_INLINE void vsplit_exponent(vf t, vf* f, vf* n) {
  *f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  *n = t;
}
MDK_INLINE vf vldexp(vf y, vf n) { return _mm512_scalef_ps(y, n); }
// x = mantissa * 2^exponent, mantissa in [sqrt(1/2), sqrt(2)). x positive.
MDK_INLINE void vsplit(vf x, vf* mantissa, vf* exponent) {
  const vf m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const vf e = _mm512_getexp_ps(x);
  const __mmask16 high = _mm512_cmp_ps_mask(m, vset(1.41421356f), _CMP_GT_OQ);
  *mantissa = _mm512_mask_mul_ps(m, high, m, vset(0.5f));
  *exponent = _mm512_mask_add_ps(e, high, e, vset(1.0f));
}

MDK_INLINE float to_float(f16_t x) { return _cvtsh_ss(x.bits); }
MDK_INLINE void from_float(float x, f16_t* out) {
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

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

MDK_INLINE vf load1(const bf16_t* p) {
  // Word i of the input becomes the upper half of lane i: one permutation.
  const __m512i order = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0,
                                         6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  const __m512i x = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, order, x));
}
MDK_INLINE vf load1(const f16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
MDK_INLINE void vstream(float* p, vf x) { _mm512_stream_ps(p, x); }
MDK_INLINE void stream_fence() { _mm_sfence(); }
MDK_INLINE uint32_t vmask_ge(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
// sum + x in the lanes where a >= b, else sum
MDK_INLINE vf vadd_where_ge(vf a, vf b, vf sum, vf x) {
  return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), sum, x);
}
