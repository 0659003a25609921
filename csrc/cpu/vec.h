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
#elif defined(MDK_ISA_NEON)
#include <arm_neon.h>
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

// Each of these defines W, vf and what works on them, and the loads and stores of 16-bit elements.
//   kFused               vfma rounds once
//   vmax, vmin           a quiet NaN in `a` gives b
//   vat_least, vat_most  a NaN in `x` stays
//   vmask_ge             bit i is set where a[i] >= b[i]
//   vadd_where_ge        sum + x in the lanes where a >= b, else sum
//   load2, store2        2 W elements as two vectors, see vec_io.h
//   load1                W elements in order
//   vstream              a store past the caches, made visible by stream_fence
#if defined(MDK_ISA_AVX512)
#include "vec_avx512.h"
#elif defined(MDK_ISA_AVX2)
#include "vec_avx2.h"
#elif defined(MDK_ISA_NEON)
#include "vec_neon.h"
#else
#include "vec_generic.h"
#endif
MDK_INLINE vf load1(const float* p) { return vload(p); }

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
// exponent field becomes 0, so that vldexp gives 0: a subnormal probability changes nothing. NaN
// stays.
MDK_INLINE void vsplit_exponent(vf t, vf* f, vf* n) {
  const vf c = vat_least(vset(-127.0f), t);
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

#include "vec_io.h"
#include "vec_log.h"

}  // namespace
