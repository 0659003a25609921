// The few vector operations that the kernel bodies use, for the instruction set that the including
// file was compiled for. Everything sits in an anonymous namespace: two instruction sets must never
// share a symbol.
//
// vf is W floats. `+ - *` work on it directly (GCC/Clang vector types).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#if defined(MDK_ISA_AVX512) || defined(MDK_ISA_AVX2)
#include <immintrin.h>
#endif

#define MDK_INLINE inline __attribute__((always_inline))

namespace {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kLowest = -3.402823466e+38f;  // finite stand-in for the maximum of an empty set

// 2^f, degree 5, minimax over coefficients that are floats and with 2^0 exactly 1: a logit far
// above the rest costs a loss of exactly 0. Relative error 1.5e-7 evaluated in fp32.
#if defined(MDK_ISA_AVX512)  // on [0, 1), nearly 2 at its end
constexpr float kExp2C0 = 1.0f, kExp2C1 = 0.6931517124176025f, kExp2C2 = 0.24015960097312927f,
                kExp2C3 = 0.055817462503910065f, kExp2C4 = 0.008992666378617287f,
                kExp2C5 = 0.0018785428255796432f;
#else  // on [-1/2, 1/2]
constexpr float kExp2C0 = 1.0f, kExp2C1 = 0.6931470036506653f, kExp2C2 = 0.24022246897220612f,
                kExp2C3 = 0.0555071085691452f, kExp2C4 = 0.009671292267739773f,
                kExp2C5 = 0.0013269530609250069f;
#endif

#if defined(MDK_ISA_AVX512)

typedef __m512 vf;
typedef __m512i vi;
constexpr int W = 16;
MDK_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
MDK_INLINE vf vload(const float* p) { return _mm512_loadu_ps(p); }
MDK_INLINE void vstore(float* p, vf x) { _mm512_storeu_ps(p, x); }
MDK_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
MDK_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }  // NaN in either: returns b
MDK_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
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

#elif defined(MDK_ISA_AVX2)

typedef __m256 vf;
typedef __m256i vi;
constexpr int W = 8;
MDK_INLINE vf vset(float x) { return _mm256_set1_ps(x); }
MDK_INLINE vf vload(const float* p) { return _mm256_loadu_ps(p); }
MDK_INLINE void vstore(float* p, vf x) { _mm256_storeu_ps(p, x); }
MDK_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
MDK_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
MDK_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
MDK_INLINE vf vshift_to_exponent(vf x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
}

#else

constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
MDK_INLINE vf vset(float x) { return vf{x, x, x, x}; }
MDK_INLINE vf vload(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
MDK_INLINE void vstore(float* p, vf x) { memcpy(p, &x, sizeof x); }
MDK_INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
MDK_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
MDK_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
MDK_INLINE vf vshift_to_exponent(vf x) { return (vf)((vi)x << 23); }

#endif

#if !defined(MDK_ISA_AVX512)
MDK_INLINE float vhsum(vf x) {
  float s[W], total = 0.0f;
  vstore(s, x);
  for (int i = 0; i < W; ++i) total += s[i];
  return total;
}
MDK_INLINE float vhmax(vf x) {
  float s[W];
  vstore(s, x);
  float best = s[0];
  for (int i = 1; i < W; ++i) best = s[i] > best ? s[i] : best;
  return best;
}
// Adding it rounds t to the nearest integer and leaves that integer plus 127, the exponent field of
// a float, in the low bits of the sum.
constexpr float kRounder = 12582912.0f + 127.0f;
// t = f + integer for t < 128; `n` holds the integer as the sum with kRounder. Below -126.5 the
// exponent field becomes 0, so that vldexp gives 0: a subnormal probability changes nothing. The
// order of the arguments of vmax keeps NaN.
MDK_INLINE void vsplit_exponent(vf t, vf* f, vf* n) {
  const vf c = vmax(vset(-127.0f), t);
  *n = c + vset(kRounder);
  *f = c - (*n - vset(kRounder));
}
MDK_INLINE vf vldexp(vf y, vf n) { return y * vshift_to_exponent(n); }
// x = mantissa * 2^exponent, mantissa in [sqrt(1/2), sqrt(2)), for a normal and positive x.
MDK_INLINE void vsplit(vf x, vf* mantissa, vf* exponent) {
  typedef int32_t vint __attribute__((vector_size(4 * W)));
  typedef uint32_t vbits __attribute__((vector_size(4 * W)));  // which may wrap: x may be anything
  const vbits bits = (vbits)x;
  const vint e = (vint)(bits - 0x3f3504f3u) >> 23;  // the bits of sqrt(1/2)
  *mantissa = (vf)(bits - ((vbits)e << 23));
  *exponent = __builtin_convertvector(e, vf);
}
#endif

// y[u] <- 2^f[u], in step.
template <int U>
MDK_INLINE void vexp2_fractions(const vf* f, vf* y) {
  constexpr float coefs[] = {kExp2C4, kExp2C3, kExp2C2, kExp2C1, kExp2C0};
  for (int u = 0; u < U; ++u) y[u] = vset(kExp2C5);
  for (const float coef : coefs)
    for (int u = 0; u < U; ++u) y[u] = vfma(y[u], f[u], vset(coef));
}

// t[u] <- 2^t[u] for t < 128: -inf gives 0, NaN stays NaN. (More may give anything.) The U
// evaluations advance in step, since one alone is a chain of dependent operations.
template <int U>
MDK_INLINE void vexp2_each(vf* t) {
  vf f[U], n[U];
  for (int u = 0; u < U; ++u) vsplit_exponent(t[u], f + u, n + u);
  vexp2_fractions<U>(f, t);
  for (int u = 0; u < U; ++u) t[u] = vldexp(t[u], n[u]);
}
MDK_INLINE vf vexp2(vf t) {
  vexp2_each<1>(&t);
  return t;
}
// scale * 2^t, |scale| < 2^127
MDK_INLINE vf vexp2_scaled(vf t, vf scale) {
  vf f, n, y;
  vsplit_exponent(t, &f, &n);
  vexp2_fractions<1>(&f, &y);
  return vldexp(y * scale, n);
}

// Element types: bits as stored. A pair of vectors is loaded at a time; the order of lanes within a
// pair is free as long as load2 and store2 agree.
struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

MDK_INLINE float to_float(float x) { return x; }
MDK_INLINE float to_float(bf16_t x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
MDK_INLINE float to_float(f16_t h) {
#if defined(MDK_ISA_AVX512) || defined(MDK_ISA_AVX2)
  return _cvtsh_ss(h.bits);
#else
  const uint32_t sign = (uint32_t)(h.bits & 0x8000) << 16, magnitude = h.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = 0x7f800000u | (magnitude & 0x3ff) << 13;
  } else {
    // Place the half's bits in a float's fields and rescale: exact, subnormals included.
    const uint32_t shifted = magnitude << 13;
    float y;
    memcpy(&y, &shifted, 4);
    y *= 0x1p112f;
    memcpy(&bits, &y, 4);
  }
  bits |= sign;
  float y;
  memcpy(&y, &bits, 4);
  return y;
#endif
}
MDK_INLINE void from_float(float x, float* out) { *out = x; }
MDK_INLINE void from_float(float x, bf16_t* out) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) {
    out->bits = (uint16_t)(bits >> 16 | 0x40);  // quiet NaN: rounding could carry it into infinity
  } else {
    out->bits = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}
MDK_INLINE void from_float(float x, f16_t* out) {
#if defined(MDK_ISA_AVX512) || defined(MDK_ISA_AVX2)
  out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out->bits = sign | 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    out->bits = sign | 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal half: let the adder round at 2^-24
    float y;
    memcpy(&y, &magnitude, 4);
    y += 0.5f;
    uint32_t rounded;
    memcpy(&rounded, &y, 4);
    out->bits = sign | (uint16_t)(rounded - 0x3f000000);
  } else {
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    out->bits = sign | (uint16_t)((rounded - 0x38000000) >> 13);
  }
#endif
}

#include "vec_io.h"
#include "vec_log.h"

}  // namespace
