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

// Exponentials that advance in step, see kInStep of mix_common.inl.
#if defined(MDK_ISA_AVX512)
constexpr int kSumsInStep = 1;
#else
constexpr int kSumsInStep = 4;
#endif

// t = (x - reference) * scale * log2(e), so that 2^t / unit is exp((x - reference) * scale).
struct Exponent {
  vf slope, reference;
  vf minus_origin;  // -reference * slope, rounded
  bool in_range;
  // 2^t at the reference, as the kernels compute it: what the rounding of the origin makes of 1. A
  // row that one logit dominates ends with exactly that logit as its log-sum-exp.
  double unit;
#if defined(MDK_INTEGER_ORIGIN)
  vf lowest, rounder;  // the logit at which t is -127, and kRounder - origin
#endif

  MDK_INLINE Exponent(float max, float scale) {
    const float k = scale * kLog2E;
    float origin = max * k;
    // Far beyond any logit, and for the stand-in of an empty row, the rounding alone, 2^-24 of the
    // origin, could carry a result out of range.
    in_range = fabsf(origin) < 1e6f;
#if defined(MDK_INTEGER_ORIGIN)
    if (in_range) origin = rintf(origin);
    lowest = vset((origin - 127.0f) / k);
    rounder = vset(kRounder - origin);
#endif
    slope = vset(k);
    reference = vset(max);
    minus_origin = vset(-origin);
    unit = 1.0;
    if (!in_range) return;
    vf one = reference;
    raise<kFused, 1>(&one);
    unit = (double)one[0];
  }

  // x[u] -> the parts of t, see vsplit_exponent.
  template <bool fused, int U>
  MDK_INLINE void split(vf* x, vf* f, vf* n) const {
    // Fused: one operation, one rounding. Otherwise the subtraction comes first: it is nearly
    // exact, where a product of logits around 1e4 would lose digits.
#if defined(MDK_INTEGER_ORIGIN)
    if (fused) {
      // With an origin that is an integer, a second product gives the integer part, and it need not
      // wait for the first.
      for (int u = 0; u < U; ++u) x[u] = vat_least(lowest, x[u]);
      for (int u = 0; u < U; ++u) n[u] = vfma(x[u], slope, rounder);
      for (int u = 0; u < U; ++u) f[u] = vfma(x[u], slope, minus_origin);
      for (int u = 0; u < U; ++u) x[u] = n[u] - vset(kRounder);
      for (int u = 0; u < U; ++u) f[u] = f[u] - x[u];
      return;
    }
#endif
    for (int u = 0; u < U; ++u)
      x[u] = fused ? vfma(x[u], slope, minus_origin) : (x[u] - reference) * slope;
    for (int u = 0; u < U; ++u) vsplit_exponent(x[u], f + u, n + u);
  }
  // x[u] <- factor * 2^t
  template <bool fused, int U>
  MDK_INLINE void raise(vf* x, vf factor = vset(1.0f)) const {
    vf f[U], n[U];
    split<fused, U>(x, f, n);
    vexp2_fractions<U>(f, x);
    for (int u = 0; u < U; ++u) x[u] = vldexp(x[u] * factor, n[u]);
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
  constexpr int U = 4;
  vf v[U], s[U], m0 = vset(-INFINITY), m1 = m0;
  for (int u = 0; u < U; ++u) s[u] = vset(0.0f);
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W) {
    prefetch_ahead(x + i, U * W);
    for (int u = 0; u < U; u += 2) drain.pair(i + u * W, 2 * W);
    for (int u = 0; u < U; u += 2) load2(x + i + u * W, v + u, v + u + 1);
    m0 = vmax(vmax(v[0], v[2]), m0);
    m1 = vmax(vmax(v[1], v[3]), m1);
    for (int u = 0; u < U; u += kSumsInStep) exponent.raise<fused, kSumsInStep>(v + u);
    if (kKeep)
      for (int u = 0; u < U; u += 2) store2(kept + i + u * W, v[u], v[u + 1]);
    for (int u = 0; u < U; ++u) s[u] += v[u];
  }
  for (; i < n; i += 2 * W) {
    drain.pair(i, n - i);
    if (i + 2 * W <= n)
      load2(x + i, v, v + 1);
    else
      load2_tail(x + i, n - i, -INFINITY, v, v + 1);
    m0 = vmax(v[0], m0);
    m1 = vmax(v[1], m1);
    exponent.raise<fused, 2>(v);
    if (kKeep) {
      if (keeps_in_row(x) && i + 2 * W > n)
        store2_tail(kept + i, n - i, v[0], v[1]);
      else
        store2(kept + i, v[0], v[1]);
    }
    for (int u = 0; u < 2; ++u) s[u] += v[u];
  }
  *block_maximum = vhmax(vmax(m0, m1));
  return vhsum((s[0] + s[1]) + (s[2] + s[3]));
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
