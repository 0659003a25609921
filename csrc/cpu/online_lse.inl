// One-pass log-sum-exp of a row, shared by the kernels; included inside an anonymous namespace.
#pragma once

// sum_j exp(x_j * scale) = sum * exp(max). `max` is a reference, not always the exact maximum.
struct SumExp {
  float max;
  double sum;
};

constexpr int64_t kLseBlock = 4096;  // elements: a block is re-read from the first-level cache
// A block whose maximum exceeds the reference by more than this (in nats) gets a new reference.
// Overflow is far away (fp32 would bear 41); what bounds it is accuracy: x - reference is rounded
// at its own size, so exp(x - reference) has a relative error of 2^-23 per 2 nats, and these are
// the terms that make up the sum.
constexpr float kRescaleAbove = 4.0f;
// How many elements ahead of the loads lines are requested: a little more than one block. On one
// Zen 5 core a 512 x 50257 fp32 gradient took 7.1 ms at 512, 6.5 at 2048, 4.9 at 5120, 5.0 at 8192.
constexpr int64_t kPrefetch = 5120;

template <class T>
MDK_INLINE void prefetch_ahead(const T* x, int64_t elements) {
  const char* line = (const char*)(x + kPrefetch);
  for (int64_t i = 0; i < elements * (int64_t)sizeof(T); i += 64)
    __builtin_prefetch(line + i, 0, 3);
}

#if defined(MDK_ISA_AVX512) || defined(MDK_ISA_AVX2)
constexpr bool kFused = true;  // vfma rounds once
#else
constexpr bool kFused = false;
#endif

// t = (x - reference) * scale * log2(e), so that 2^t / unit is exp((x - reference) * scale).
struct Exponent {
  vf slope, reference;
  vf minus_origin;  // -reference * slope, rounded
  bool in_range;
  // 2^t at the reference, as the kernels compute it: what the rounding of the origin makes of 1. A
  // row that one logit dominates ends with exactly that logit as its log-sum-exp.
  double unit;

  MDK_INLINE Exponent(float max, float scale) {
    const float k = scale * kLog2E, origin = max * k;
    slope = vset(k);
    reference = vset(max);
    minus_origin = vset(-origin);
    // Far beyond any logit, and for the stand-in of an empty row, the rounding alone, 2^-24 of the
    // origin, could carry a result out of range.
    in_range = fabsf(origin) < 1e6f;
    unit = in_range ? (double)vexp2(at<kFused>(reference))[0] : 1.0;
  }
  // Fused: one operation, one rounding. Otherwise the subtraction comes first: it is nearly exact,
  // where a product of logits around 1e4 would lose digits.
  template <bool fused>
  MDK_INLINE vf at(vf x) const {
    return fused ? vfma(x, slope, minus_origin) : (x - reference) * slope;
  }
};

// The exponentials of an fp32 row are kept where its gradient goes and must end with the row. Those
// of a 16-bit row live in scratch with slack, in whole pairs: their lanes are even and odd
// elements.
MDK_INLINE constexpr bool keeps_in_row(const float*) { return true; }
template <class T>
MDK_INLINE constexpr bool keeps_in_row(const T*) {
  return false;
}

template <class T>
MDK_INLINE float block_max(const T* x, int64_t n) {
  vf m0 = vset(-INFINITY), m1 = m0, m2 = m0, m3 = m0, a, b, c, d;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    load2(x + i, &a, &b);
    load2(x + i + 2 * W, &c, &d);
    m0 = vmax(a, m0);
    m1 = vmax(b, m1);
    m2 = vmax(c, m2);
    m3 = vmax(d, m3);
  }
  for (; i < n; i += 2 * W) {
    if (i + 2 * W <= n)
      load2(x + i, &a, &b);
    else
      load2_tail(x + i, n - i, -INFINITY, &a, &b);
    m0 = vmax(a, m0);
    m1 = vmax(b, m1);
  }
  return vhmax(vmax(vmax(m0, m2), vmax(m1, m3)));
}

// Sum of 2^t over one block, with the block's own maximum as a by-product. With
// kKeep the exponentials are also stored to `kept` as fp32 pairs, in the order load2 gives them.
template <bool kKeep, bool fused, class T, class Drain>
MDK_INLINE float block_sum_by(const T* x, int64_t n, const Exponent& exponent, float* block_maximum,
                              float* kept, const Drain& drain) {
  vf s0 = vset(0.0f), s1 = s0, s2 = s0, s3 = s0;
  vf m0 = vset(-INFINITY), m1 = m0, a, b, c, d;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    prefetch_ahead(x + i, 4 * W);
    drain.pair(i, 2 * W);
    drain.pair(i + 2 * W, 2 * W);
    load2(x + i, &a, &b);
    load2(x + i + 2 * W, &c, &d);
    m0 = vmax(vmax(a, c), m0);
    m1 = vmax(vmax(b, d), m1);
    a = vexp2(exponent.at<fused>(a));
    b = vexp2(exponent.at<fused>(b));
    c = vexp2(exponent.at<fused>(c));
    d = vexp2(exponent.at<fused>(d));
    if (kKeep) {
      store2(kept + i, a, b);
      store2(kept + i + 2 * W, c, d);
    }
    s0 += a;
    s1 += b;
    s2 += c;
    s3 += d;
  }
  for (; i < n; i += 2 * W) {
    drain.pair(i, n - i);
    if (i + 2 * W <= n)
      load2(x + i, &a, &b);
    else
      load2_tail(x + i, n - i, -INFINITY, &a, &b);
    m0 = vmax(a, m0);
    m1 = vmax(b, m1);
    a = vexp2(exponent.at<fused>(a));
    b = vexp2(exponent.at<fused>(b));
    if (kKeep) {
      if (keeps_in_row(x) && i + 2 * W > n)
        store2_tail(kept + i, n - i, a, b);
      else
        store2(kept + i, a, b);
    }
    s0 += a;
    s1 += b;
  }
  *block_maximum = vhmax(vmax(m0, m1));
  return vhsum((s0 + s1) + (s2 + s3));
}
template <bool kKeep, class T, class Drain>
MDK_INLINE float block_sum(const T* x, int64_t n, const Exponent& exponent, float* block_maximum,
                           float* kept, const Drain& drain) {
  return exponent.in_range ? block_sum_by<kKeep, kFused>(x, n, exponent, block_maximum, kept, drain)
                           : block_sum_by<kKeep, false>(x, n, exponent, block_maximum, kept, drain);
}

// What else is done on the way through a row: see KeptRow of sparse_kl.inl. Here nothing.
struct NoDrain {
  MDK_INLINE void block(int64_t, float) {}
  MDK_INLINE void pair(int64_t, int64_t) const {}
};

// Reads the row once: the sum runs against a running reference, and only a block that would
// overflow it is read again (from cache). NaN anywhere makes the sum NaN.
//
// With kKeep, kept[j] / unit = exp(x_j - reference) for the Exponent of the reference of its block,
// so that the caller gets the softmax with a multiplication instead of a second exponential. `kept`
// may be the row itself; its blocks can then not be read twice, so their maximum is taken first.
//
// `drain` comes by every element once, before its place in `kept` is written.
template <bool kKeep, class T, class Drain>
MDK_INLINE SumExp row_sum_exp(const T* x, int64_t n, float* kept, float* references, Drain drain) {
  const bool overwrites = kKeep && (const void*)kept == (const void*)x;
  const float head = block_max(x, n < 512 ? n : 512);
  SumExp acc = {head > kLowest ? head : kLowest, 0.0};
  Exponent exponent(acc.max, 1.0f);
  for (int64_t i = 0; i < n; i += kLseBlock) {
    const int64_t size = n - i < kLseBlock ? n - i : kLseBlock;
    float maximum = acc.max, sum = 0.0f;
    if (kKeep) drain.block(i, references[i / kLseBlock]);
    if (overwrites)
      maximum = block_max(x + i, size);
    else
      sum = block_sum<kKeep>(x + i, size, exponent, &maximum, kept + i, drain);
    const bool rescale = maximum - acc.max > kRescaleAbove;
    if (rescale) {
      acc.sum *= exp((double)acc.max - (double)maximum);
      acc.max = maximum;
      exponent = Exponent(maximum, 1.0f);
    }
    if (rescale || overwrites)
      sum = block_sum<kKeep>(x + i, size, exponent, &maximum, kept + i, NoDrain());
    if (kKeep) references[i / kLseBlock] = acc.max;
    acc.sum += (double)sum / exponent.unit;
  }
  return acc;
}
