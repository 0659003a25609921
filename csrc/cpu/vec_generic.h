// Any processor: GCC/Clang vector types. Included inside vec.h's anonymous namespace.
#pragma once

constexpr int W = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
constexpr bool kFused = false;
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
MDK_INLINE vf vat_least(vf low, vf x) { return vmax(low, x); }
MDK_INLINE vf vat_most(vf high, vf x) { return vmin(high, x); }
MDK_INLINE vf vshift_to_exponent(vf x) { return (vf)((vi)x << 23); }

MDK_INLINE float to_float(f16_t h) {
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
}
MDK_INLINE void from_float(float x, f16_t* out) {
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
}

template <class T>
MDK_INLINE void load2(const T* p, vf* a, vf* b) {
  float s[2 * W];
  for (int i = 0; i < 2 * W; ++i) s[i] = to_float(p[i]);
  *a = vload(s);
  *b = vload(s + W);
}
template <class T>
MDK_INLINE void store2(T* p, vf a, vf b) {
  float s[2 * W];
  vstore(s, a);
  vstore(s + W, b);
  for (int i = 0; i < 2 * W; ++i) from_float(s[i], p + i);
}
template <class T>
MDK_INLINE vf load1(const T* p) {
  float s[W];
  for (int i = 0; i < W; ++i) s[i] = to_float(p[i]);
  return vload(s);
}
MDK_INLINE void vstream(float* p, vf x) { vstore(p, x); }
MDK_INLINE void stream_fence() {}
MDK_INLINE uint32_t vmask_ge(vf a, vf b) {
  uint32_t mask = 0;
  for (int i = 0; i < W; ++i) mask |= (uint32_t)(a[i] >= b[i]) << i;
  return mask;
}
MDK_INLINE vf vadd_where_ge(vf a, vf b, vf sum, vf x) { return sum + (vf)((vi)(a >= b) & (vi)x); }
