// AVX2 with FMA and F16C. Included inside vec.h's anonymous namespace.
#pragma once

typedef __m256 vf;
typedef __m256i vi;
constexpr int W = 8;
constexpr bool kFused = true;
#define MDK_INTEGER_ORIGIN  // of the exponentials of a row, see Exponent
MDK_INLINE vf vset(float x) { return _mm256_set1_ps(x); }
MDK_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
MDK_INLINE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
MDK_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
MDK_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
MDK_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
MDK_INLINE vf vat_least(vf low, vf x) { return vmax(low, x); }
MDK_INLINE vf vat_most(vf high, vf x) { return vmin(high, x); }
MDK_INLINE vf vshift_to_exponent(vf x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
}

MDK_INLINE float to_float(f16_t x) { return _cvtsh_ss(x.bits); }
MDK_INLINE void from_float(float x, f16_t* out) {
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

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

MDK_INLINE vf load1(const bf16_t* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
MDK_INLINE vf load1(const f16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
MDK_INLINE void vstream(float* p, vf x) { _mm256_stream_ps(p, x); }
MDK_INLINE void stream_fence() { _mm_sfence(); }
MDK_INLINE uint32_t vmask_ge(vf a, vf b) {
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ));
}
MDK_INLINE vf vadd_where_ge(vf a, vf b, vf sum, vf x) {
  return sum + _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), x);
}
