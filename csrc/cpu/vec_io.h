// Loads and stores of 2 W elements as two vectors; included inside vec.h's anonymous namespace.
//
// For bf16 the pair holds the even and the odd elements (a shift and a mask instead of a shuffle);
// for the other types the first and the second half. Element-wise work and reductions do not care,
// and store2 undoes what load2 did. Nothing may assume that lane i is element i.
#pragma once

MDK_INLINE void load2(const float* p, vf* a, vf* b) {
  *a = vload(p);
  *b = vload(p + W);
}
MDK_INLINE void store2(float* p, vf a, vf b) {
  vstore(p, a);
  vstore(p + W, b);
}

// The last n < 2 W elements of a row, padded with `pad`.
template <class T>
MDK_INLINE void load2_tail(const T* p, int64_t n, float pad, vf* a, vf* b) {
  T s[2 * W];
  for (int i = 0; i < 2 * W; ++i) {
    if (i < n)
      s[i] = p[i];
    else
      from_float(pad, s + i);
  }
  load2(s, a, b);
}
template <class T>
MDK_INLINE void store2_tail(T* p, int64_t n, vf a, vf b) {
  T s[2 * W];
  store2(s, a, b);
  for (int i = 0; i < n; ++i) p[i] = s[i];
}
