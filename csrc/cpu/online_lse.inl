// One-pass log-sum-exp of a row, shared by the kernels; included inside an anonymous namespace.
#pragma once

// sum_j exp(x_j * scale) = sum * exp(max). `max` is a reference, not always the exact maximum.
struct SumExp {
  float max;
  double sum;
};

constexpr int64_t kLseBlock = 4096;  // elements: a block is re-read from the first-level cache
// A block whose maximum exceeds the reference by more than this (in nats) is redone with a new
// reference. Below it fp32 has room: exp(41) = 2^59, times 2^20 elements, is far from overflow.
constexpr float kRescaleAbove = 41.0f;

template <class T>
MDK_INLINE float block_max(const T* x, int64_t n) {
  vf m0 = vset(-INFINITY), m1 = m0, a, b;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    load2(x + i, &a, &b);
    m0 = vmax(a, m0);
    m1 = vmax(b, m1);
  }
  if (i < n) {
    load2_tail(x + i, n - i, -INFINITY, &a, &b);
    m0 = vmax(a, m0);
    m1 = vmax(b, m1);
  }
  return vhmax(vmax(m0, m1));
}

// Sum of exp((x - max) * scale) over one block, with the block's own maximum as a by-product.
template <class T>
MDK_INLINE float block_sum(const T* x, int64_t n, float max, float scale, float* block_maximum) {
  const vf reference = vset(max), k = vset(scale * kLog2E);
  vf s0 = vset(0.0f), s1 = s0, s2 = s0, s3 = s0;
  vf m0 = vset(-INFINITY), m1 = m0, a, b, c, d;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    load2(x + i, &a, &b);
    load2(x + i + 2 * W, &c, &d);
    m0 = vmax(vmax(a, c), m0);
    m1 = vmax(vmax(b, d), m1);
    s0 += vexp2((a - reference) * k);
    s1 += vexp2((b - reference) * k);
    s2 += vexp2((c - reference) * k);
    s3 += vexp2((d - reference) * k);
  }
  for (; i < n; i += 2 * W) {
    if (i + 2 * W <= n)
      load2(x + i, &a, &b);
    else
      load2_tail(x + i, n - i, -INFINITY, &a, &b);
    m0 = vmax(a, m0);
    m1 = vmax(b, m1);
    s0 += vexp2((a - reference) * k);
    s1 += vexp2((b - reference) * k);
  }
  *block_maximum = vhmax(vmax(m0, m1));
  return vhsum((s0 + s1) + (s2 + s3));
}

// Reads the row once: the sum runs against a running reference, and only a block that would
// overflow it is read again (from cache). NaN anywhere makes the sum NaN.
template <class T>
MDK_INLINE SumExp row_sum_exp(const T* x, int64_t n, float scale) {
  const float head = block_max(x, n < 512 ? n : 512);
  SumExp acc = {head > kLowest ? head : kLowest, 0.0};
  for (int64_t i = 0; i < n; i += kLseBlock) {
    const int64_t size = n - i < kLseBlock ? n - i : kLseBlock;
    float maximum;
    float sum = block_sum(x + i, size, acc.max, scale, &maximum);
    if ((maximum - acc.max) * scale > kRescaleAbove) {
      acc.sum *= exp((double)(acc.max - maximum) * (double)scale);
      acc.max = maximum;
      sum = block_sum(x + i, size, acc.max, scale, &maximum);
    }
    acc.sum += (double)sum;
  }
  return acc;
}
