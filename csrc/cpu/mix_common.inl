// What the mixture kernels share: loads in element order, and partial sums that do not depend on
// how a row is split. Included inside an anonymous namespace.
#pragma once

// W elements in order (load2 of vec_io.h is free to permute them).
MDK_INLINE vf load1(const float* p) { return vload(p); }
#if defined(MDK_ISA_AVX512)
MDK_INLINE vf load1(const bf16_t* p) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
MDK_INLINE vf load1(const f16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
MDK_INLINE void vstream(float* p, vf x) { _mm512_stream_ps(p, x); }
MDK_INLINE void stream_fence() { _mm_sfence(); }
MDK_INLINE uint32_t vmask_ge(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
MDK_INLINE vf vone_where_ge(vf a, vf b) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), vset(1.0f));
}
#elif defined(MDK_ISA_AVX2)
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
MDK_INLINE vf vone_where_ge(vf a, vf b) {
  return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), vset(1.0f));
}
#else
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
MDK_INLINE vf vone_where_ge(vf a, vf b) { return (vf)((vi)(a >= b) & (vi)vset(1.0f)); }
#endif

// The first n < W elements, the rest `pad`.
template <class T>
MDK_INLINE vf load1_part(const T* p, int64_t n, float pad) {
  float s[W];
  for (int i = 0; i < W; ++i) s[i] = i < n ? to_float(p[i]) : pad;
  return vload(s);
}
MDK_INLINE void store1_part(float* p, int64_t n, vf x) {
  float s[W];
  vstore(s, x);
  for (int i = 0; i < n; ++i) p[i] = s[i];
}

// The reference of a row's sums: the maximum of its head, finite. A block that rises so far above
// it that fp32 could overflow takes its own maximum instead. No block looks at another one, which
// makes the sums independent of how a row is split.
template <class T>
MDK_INLINE float mix_reference(const T* x, int64_t width) {
  const float head = block_max(x, width < kMixPart ? width : kMixPart);
  return head > kLowest ? head : kLowest;
}

// Sum over x[0, n) of exp((x - reference) * scale). With kMaxima, the lane maxima of every part
// of kMixPart elements go to `maxima`, W floats each.
template <bool kMaxima, class T>
MDK_INLINE float mix_block_sum(const T* x, int64_t n, float reference, float scale, float* maximum,
                               float* maxima) {
  const vf r = vset(reference), k = vset(scale * kLog2E);
  vf s0 = vset(0.0f), s1 = s0, s2 = s0, s3 = s0, top = vset(-INFINITY), a, b, c, d;
  for (int64_t part = 0; part < n; part += kMixPart) {
    const int64_t stop = n - part < kMixPart ? n : part + kMixPart;
    vf m0 = vset(-INFINITY), m1 = m0;
    int64_t i = part;
    for (; i + 4 * W <= stop; i += 4 * W) {
      load2(x + i, &a, &b);
      load2(x + i + 2 * W, &c, &d);
      m0 = vmax(vmax(a, c), m0);
      m1 = vmax(vmax(b, d), m1);
      s0 += vexp2((a - r) * k);
      s1 += vexp2((b - r) * k);
      s2 += vexp2((c - r) * k);
      s3 += vexp2((d - r) * k);
    }
    for (; i < stop; i += 2 * W) {
      if (i + 2 * W <= stop)
        load2(x + i, &a, &b);
      else
        load2_tail(x + i, stop - i, -INFINITY, &a, &b);
      m0 = vmax(a, m0);
      m1 = vmax(b, m1);
      s0 += vexp2((a - r) * k);
      s1 += vexp2((b - r) * k);
    }
    m0 = vmax(m0, m1);
    if (kMaxima) vstore(maxima + part / kMixPart * W, m0);
    top = vmax(m0, top);
  }
  *maximum = vhmax(top);
  return vhsum((s0 + s1) + (s2 + s3));
}

template <bool kMaxima, class T>
void mix_sums_typed(const T* x, int64_t width, float scale, int64_t block_begin, int64_t block_end,
                    MdkMixBlock* blocks, float* maxima) {
  const float reference = mix_reference(x, width);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t i = block * kMixBlock;
    const int64_t n = width - i < kMixBlock ? width - i : kMixBlock;
    float* out = kMaxima ? maxima + i / kMixPart * W : nullptr;
    float maximum, used = reference;
    float sum = mix_block_sum<kMaxima>(x + i, n, used, scale, &maximum, out);
    if ((maximum - used) * scale > kRescaleAbove) {
      used = maximum;
      sum = mix_block_sum<false>(x + i, n, used, scale, &maximum, nullptr);
    }
    blocks[block] = MdkMixBlock{used, sum};
  }
}

template <class T>
MDK_INLINE void mix_sums_of(const void* row, int64_t width, float scale, int64_t block_begin,
                            int64_t block_end, MdkMixBlock* blocks, float* maxima) {
  const T* x = (const T*)row;
  if (maxima)
    mix_sums_typed<true>(x, width, scale, block_begin, block_end, blocks, maxima);
  else
    mix_sums_typed<false>(x, width, scale, block_begin, block_end, blocks, nullptr);
}

void mix_sums(const void* row, int dtype, int64_t width, float scale, int64_t block_begin,
              int64_t block_end, MdkMixBlock* blocks, float* maxima) {
  if (dtype == MDK_F32)
    mix_sums_of<float>(row, width, scale, block_begin, block_end, blocks, maxima);
  else if (dtype == MDK_BF16)
    mix_sums_of<bf16_t>(row, width, scale, block_begin, block_end, blocks, maxima);
  else
    mix_sums_of<f16_t>(row, width, scale, block_begin, block_end, blocks, maxima);
}
