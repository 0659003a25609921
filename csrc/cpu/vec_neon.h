// aarch64: its baseline, so nothing needs to be asked of the processor. Included inside vec.h's
// anonymous namespace.
#pragma once

typedef float32x4_t vf;
typedef int32x4_t vi;
constexpr int W = 4;
constexpr bool kFused = true;
#define MDK_INTEGER_ORIGIN  // of the exponentials of a row, see Exponent
MDK_INLINE vf vset(float x) { return vdupq_n_f32(x); }
MDK_INLINE vf vload(const float* p) { return vld1q_f32(p); }
MDK_INLINE void vstore(float* p, vf x) { vst1q_f32(p, x); }
MDK_INLINE vf vfma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
MDK_INLINE vf vmax(vf a, vf b) { return vmaxnmq_f32(a, b); }  // the other one if one is NaN
MDK_INLINE vf vmin(vf a, vf b) { return vminnmq_f32(a, b); }
MDK_INLINE vf vat_least(vf low, vf x) { return vmaxq_f32(low, x); }
MDK_INLINE vf vat_most(vf high, vf x) { return vminq_f32(high, x); }
MDK_INLINE vf vshift_to_exponent(vf x) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 23));
}

MDK_INLINE float to_float(f16_t x) {
  __fp16 half;
  memcpy(&half, &x, 2);
  return half;
}
MDK_INLINE void from_float(float x, f16_t* out) {
  const __fp16 half = x;
  memcpy(out, &half, 2);
}

MDK_INLINE void load2(const bf16_t* p, vf* a, vf* b) {
  const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16((const uint16_t*)p));
  *a = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
  *b = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000)));
}
// The rounded bf16 in the upper half of each lane. NaN as in vec_avx2.h.
MDK_INLINE uint32x4_t vround_bf16(vf x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
}
MDK_INLINE void store2(bf16_t* p, vf a, vf b) {
  // Shifts the even elements in below the odd ones.
  const uint32x4_t both = vsriq_n_u32(vround_bf16(b), vround_bf16(a), 16);
  vst1q_u16((uint16_t*)p, vreinterpretq_u16_u32(both));
}
MDK_INLINE void load2(const f16_t* p, vf* a, vf* b) {
  const float16x8_t x = vreinterpretq_f16_u16(vld1q_u16((const uint16_t*)p));
  *a = vcvt_f32_f16(vget_low_f16(x));
  *b = vcvt_high_f32_f16(x);
}
MDK_INLINE void store2(f16_t* p, vf a, vf b) {
  vst1q_u16((uint16_t*)p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a), b)));
}

MDK_INLINE vf load1(const bf16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p), 16));
}
MDK_INLINE vf load1(const f16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
}
MDK_INLINE void vstream(float* p, vf x) { vstore(p, x); }
MDK_INLINE void stream_fence() {}
MDK_INLINE uint32_t vmask_ge(vf a, vf b) {
  const uint32x4_t bit = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(vcgeq_f32(a, b), bit));
}
MDK_INLINE vf vadd_where_ge(vf a, vf b, vf sum, vf x) {
  return sum + vreinterpretq_f32_u32(vandq_u32(vcgeq_f32(a, b), vreinterpretq_u32_f32(x)));
}
