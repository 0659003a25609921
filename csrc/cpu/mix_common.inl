// What the mixture kernels share: loads in element order, and partial sums that do not depend on
// how a row is split. Included inside an anonymous namespace.
#pragma once

// Vectors that advance in step through a long chain of dependent operations. Without AVX-512 a
// chain has more operations than the scheduler holds, so they must come in the order in which they
// can run, and registers that spill cost less than waiting: the mixture of two rows in cache
// took 20.8 cycles per 8 elements at 2, 17.5 at 4, 14.1 at 6 and at 8 on a Zen 3 core.
#if defined(MDK_ISA_AVX512)
constexpr int kInStep = 4;
#else
constexpr int kInStep = 6;
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

// Sums of exp((x - reference) * scale) over one block of a row. All blocks share the maximum of the
// row's head as their reference, unless a block rises so far above it that fp32 could overflow, or
// the head is masked; such a block takes its own maximum. No block looks at another one, which
// makes the sums independent of how a row is split.
template <class T>
struct MixSums {
  const T* x;
  int64_t width;
  float scale, reference;
  Exponent exponent;

  MixSums(const T* row, int64_t n, float s)
      : x(row),
        width(n),
        scale(s),
        reference(block_max(x, n < kMixPart ? n : kMixPart)),
        exponent(reference, s) {}

  // With kMaxima, the lane maxima of every part of kMixPart elements go to `maxima`, W floats each.
  template <bool kMaxima>
  MDK_INLINE float sum_shared(int64_t begin, int64_t end, float* maximum, float* maxima) const {
    constexpr int U = 4;
    vf s[U], top = vset(-INFINITY);
    for (int u = 0; u < U; ++u) s[u] = vset(0.0f);
    for (int64_t part = begin; part < end; part += kMixPart) {
      const int64_t stop = end - part < kMixPart ? end : part + kMixPart;
      vf m[U], t[U];
      for (int u = 0; u < U; ++u) m[u] = vset(-INFINITY);
      int64_t i = part;
      for (; i + U * W <= stop; i += U * W) {
        for (int u = 0; u < U; u += 2) load2(x + i + u * W, t + u, t + u + 1);
        for (int u = 0; u < U; ++u) m[u] = vmax(t[u], m[u]);
        exponent.raise<kFused, U>(t);
        for (int u = 0; u < U; ++u) s[u] += t[u];
      }
      for (; i < stop; i += 2 * W) {
        if (i + 2 * W <= stop)
          load2(x + i, t, t + 1);
        else
          load2_tail(x + i, stop - i, -INFINITY, t, t + 1);
        for (int u = 0; u < 2; ++u) m[u] = vmax(t[u], m[u]);
        exponent.raise<kFused, 2>(t);
        for (int u = 0; u < 2; ++u) s[u] += t[u];
      }
      m[0] = vmax(vmax(m[0], m[1]), vmax(m[2], m[3]));
      if (kMaxima) vstore(maxima + part / kMixPart * W, m[0]);
      top = vmax(m[0], top);
    }
    *maximum = vhmax(top);
    return vhsum((s[0] + s[1]) + (s[2] + s[3])) / (float)exponent.unit;
  }

  // Against the block's own maximum, with the subtraction first.
  MDK_INLINE float sum_own(int64_t begin, int64_t end, float own) const {
    const vf r = vset(own);
    vf s0 = vset(0.0f), s1 = s0, a, b;
    for (int64_t i = begin; i < end; i += 2 * W) {
      if (i + 2 * W <= end)
        load2(x + i, &a, &b);
      else
        load2_tail(x + i, end - i, -INFINITY, &a, &b);
      s0 += vexp2((a - r) * exponent.slope);
      s1 += vexp2((b - r) * exponent.slope);
    }
    return vhsum(s0 + s1);
  }

  template <bool kMaxima>
  MDK_INLINE MdkMixBlock block(int64_t index, float* maxima) const {
    const int64_t begin = index * kMixBlock;
    const int64_t end = width - begin < kMixBlock ? width : begin + kMixBlock;
    float maximum;
    const float sum = sum_shared<kMaxima>(begin, end, &maximum, maxima);
    if (exponent.in_range && !((maximum - reference) * scale > kRescaleAbove))
      return MdkMixBlock{reference, sum};
    const float own = maximum > kLowest ? maximum : kLowest;
    return MdkMixBlock{own, sum_own(begin, end, own)};
  }
};

template <bool kMaxima, class T>
void mix_sums_typed(const T* x, int64_t width, float scale, int64_t block_begin, int64_t block_end,
                    MdkMixBlock* blocks, float* maxima) {
  const MixSums<T> sums(x, width, scale);
  for (int64_t i = block_begin; i < block_end; ++i)
    blocks[i] = sums.template block<kMaxima>(i, maxima);
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
