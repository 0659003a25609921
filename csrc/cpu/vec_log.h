// Logarithms on vectors; included inside vec.h's anonymous namespace.
#pragma once

// Natural logarithm of a normal positive x, about 1 ulp: log(m) + e ln 2 with m in
// [sqrt(1/2), sqrt(2)) and r = m - 1, log(1 + r) = r - r^2/2 + r^3 P(r).
MDK_INLINE vf vlog(vf x) {
  vf m, e;
  vsplit(x, &m, &e);
  const vf r = m - vset(1.0f), r2 = r * r;
  vf p = vfma(vset(0.0691542989053f), r, vset(-0.117898393496f));
  p = vfma(p, r, vset(0.118729652394f));
  p = vfma(p, r, vset(-0.123843424303f));
  p = vfma(p, r, vset(0.142186588665f));
  p = vfma(p, r, vset(-0.166692511856f));
  p = vfma(p, r, vset(0.200022265836f));
  p = vfma(p, r, vset(-0.249999865928f));
  p = vfma(p, r, vset(0.333333104404f));
  // ln 2 in two parts, so that e * high is exact and the sum keeps its last bits.
  vf y = vfma(p, r * r2, e * vset(-2.12194440e-4f));
  y = vfma(vset(-0.5f), r2, y);
  return vfma(e, vset(0.693359375f), r + y);
}

// x[u] <- log(1 + x[u]) for x in [0, 1], absolute error 3e-8 plus rounding; exactly 0 at 0. The U
// evaluations advance in step, since one alone is a chain of dependent operations.
template <int U>
MDK_INLINE void vlog1p_unit(vf* x) {
  constexpr float coefs[] = {-0.0301109685962f, 0.079210751614f, -0.137466237322f, 0.191451175029f,
                             -0.248529461627f,  0.333203436281f, -0.499995525949f, 0.999999974534f};
  vf p[U];
  for (int u = 0; u < U; ++u) p[u] = vset(0.00538406206362f);
  for (const float coef : coefs)
    for (int u = 0; u < U; ++u) p[u] = vfma(p[u], x[u], vset(coef));
  for (int u = 0; u < U; ++u) x[u] = p[u] * x[u];
}
