// The mixture of a row written out: log sum_k exp(term_k). Derivation and numerics are in
// mdkernels/ops/logit_mix/README.md. Included inside an anonymous namespace.

// (x - max) * scale + offset: the subtraction comes first because it is nearly exact, also for
// logits around 1e4. `unit`: the scale is 1, and an addition takes a place that multiplications
// compete for.
template <bool unit>
struct MixAffine {
  vf max, scale, offset;
  MDK_INLINE vf operator()(vf x) const {
    return unit ? (x - max) + offset : vfma(x - max, scale, offset);
  }
};
template <bool unit>
MDK_INLINE MixAffine<unit> mix_affine(const MdkMixTerm* term) {
  return MixAffine<unit>{vset(term->max), vset(term->scale), vset(term->offset)};
}

// A body computes a[u] from a[u] and b[u] for U vectors in step.
template <bool unit>
struct MixPair {
  MixAffine<unit> f, g;
  vf shift;
  // log(e^f(a) + e^g(b)) + shift. Two -inf give -inf: the finite floor keeps their difference from
  // being NaN.
  template <int U>
  MDK_INLINE void apply(vf* a, vf* b) const {
    vf high[U];
    for (int u = 0; u < U; ++u) a[u] = f(a[u]);
    for (int u = 0; u < U; ++u) b[u] = g(b[u]);
    for (int u = 0; u < U; ++u) high[u] = vmax(a[u], b[u]);
    for (int u = 0; u < U; ++u) b[u] = vmin(a[u], b[u]);
    for (int u = 0; u < U; ++u) b[u] = b[u] - vmax(high[u], vset(kLowest));
    for (int u = 0; u < U; ++u) b[u] = b[u] * vset(kLog2E);
    vexp2_each<U>(b);
    vlog1p_unit<U>(b);
    for (int u = 0; u < U; ++u) a[u] = (high[u] + b[u]) + shift;
  }
};
struct MixSingle {
  MixAffine<false> f;
  vf shift;
  template <int U>
  MDK_INLINE void apply(vf* a, vf*) const {
    for (int u = 0; u < U; ++u) a[u] = f(a[u]) + shift;
  }
};

// out[0, n) = body(a[0, n), b[0, n)), with stores that bypass the caches if `streaming`.
template <bool streaming, class A, class B, class Body>
MDK_INLINE void mix_map(const A* a, const B* b, int64_t n, float* out, Body body) {
  constexpr int U = kInStep;
  const auto part = [&](int64_t i, int64_t size) {
    const bool whole = size == W;
    vf x = whole ? load1(a + i) : load1_part(a + i, size, 0.0f);
    vf y = whole ? load1(b + i) : load1_part(b + i, size, 0.0f);
    body.template apply<1>(&x, &y);
    if (whole)
      vstore(out + i, x);
    else
      store1_part(out + i, size, x);
  };
  int64_t i = 0;
  if (streaming) {  // such a store needs an aligned address
    constexpr uintptr_t line = 64 / sizeof(float);
    const int64_t misaligned = (int64_t)((0 - (uintptr_t)out / sizeof(float)) % line);
    const int64_t head = misaligned < n ? misaligned : n;
    for (; i < head; i += W) part(i, head - i < W ? head - i : W);
    i = head;
  }
  vf x[U], y[U];
  for (; i + U * W <= n; i += U * W) {
    for (int u = 0; u < U; ++u) x[u] = load1(a + i + u * W);
    for (int u = 0; u < U; ++u) y[u] = load1(b + i + u * W);
    body.template apply<U>(x, y);
    for (int u = 0; u < U; ++u) {
      if (streaming)
        vstream(out + i + u * W, x[u]);
      else
        vstore(out + i + u * W, x[u]);
    }
  }
  for (; i < n; i += W) part(i, n - i < W ? n - i : W);
}
template <class A, class B, class Body>
MDK_INLINE void mix_map_to(const A* a, const B* b, int64_t n, float* out, int streaming,
                           Body body) {
  if (streaming)
    mix_map<true>(a, b, n, out, body);
  else
    mix_map<false>(a, b, n, out, body);
}

template <bool unit, class A, class B>
void mix_pair(const MdkMixTerm* s, const MdkMixTerm* t, int64_t n, float shift, float* out,
              int streaming) {
  const MixPair<unit> body = {mix_affine<unit>(s), mix_affine<unit>(t), vset(shift)};
  mix_map_to((const A*)s->row, (const B*)t->row, n, out, streaming, body);
}
template <class A>
void mix_pair_of(const MdkMixTerm* s, const MdkMixTerm* t, int64_t n, float shift, float* out,
                 int streaming) {
  if (s->scale == 1.0f && t->scale == 1.0f && s->dtype == t->dtype)
    mix_pair<true, A, A>(s, t, n, shift, out, streaming);
  else if (t->dtype == MDK_F32)
    mix_pair<false, A, float>(s, t, n, shift, out, streaming);
  else if (t->dtype == MDK_BF16)
    mix_pair<false, A, bf16_t>(s, t, n, shift, out, streaming);
  else
    mix_pair<false, A, f16_t>(s, t, n, shift, out, streaming);
}
void mix_two(const MdkMixTerm* s, const MdkMixTerm* t, int64_t n, float shift, float* out,
             int streaming) {
  if (s->dtype == MDK_F32)
    mix_pair_of<float>(s, t, n, shift, out, streaming);
  else if (s->dtype == MDK_BF16)
    mix_pair_of<bf16_t>(s, t, n, shift, out, streaming);
  else
    mix_pair_of<f16_t>(s, t, n, shift, out, streaming);
}

template <class A>
void mix_single(const MdkMixTerm* s, int64_t n, float shift, float* out, int streaming) {
  const MixSingle body = {mix_affine<false>(s), vset(shift)};
  mix_map_to((const A*)s->row, (const A*)s->row, n, out, streaming, body);
}
void mix_one(const MdkMixTerm* s, int64_t n, float shift, float* out, int streaming) {
  if (s->dtype == MDK_F32)
    mix_single<float>(s, n, shift, out, streaming);
  else if (s->dtype == MDK_BF16)
    mix_single<bf16_t>(s, n, shift, out, streaming);
  else
    mix_single<f16_t>(s, n, shift, out, streaming);
}

MDK_INLINE MdkMixTerm mix_from(MdkMixTerm term, int64_t element) {
  term.row = (const char*)term.row + element * (term.dtype == MDK_F32 ? 4 : 2);
  return term;
}

// Three terms and more: the sum of the first ones stays in a tile of the first-level cache.
void mix_many(const MdkMixTerm* terms, int count, int64_t n, float shift, float* out,
              int streaming) {
  constexpr int64_t kTile = 1024;
  float tile[kTile];
  const MdkMixTerm sum = {tile, kTile, MDK_F32, 1.0f, 0.0f, 0.0f};
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t size = n - i < kTile ? n - i : kTile;
    const MdkMixTerm first = mix_from(terms[0], i), second = mix_from(terms[1], i);
    mix_two(&first, &second, size, 0.0f, tile, 0);
    for (int k = 2; k < count; ++k) {
      const MdkMixTerm next = mix_from(terms[k], i);
      if (k + 1 < count)
        mix_two(&sum, &next, size, 0.0f, tile, 0);
      else
        mix_two(&sum, &next, size, shift, out + i, streaming);
    }
  }
}

void mix_write(const MdkMixTerm* terms, int count, int64_t begin, int64_t end, float shift,
               float* out, int streaming) {
  while (begin < end) {  // stretches over which the same terms are present
    MdkMixTerm live[kMixTerms];
    int alive = 0;
    int64_t stop = end;
    for (int k = 0; k < count; ++k) {
      if (terms[k].width <= begin) continue;
      live[alive++] = mix_from(terms[k], begin);
      if (terms[k].width < stop) stop = terms[k].width;
    }
    const int64_t n = stop - begin;
    if (alive == 0)
      for (int64_t i = 0; i < n; ++i) out[i] = -INFINITY;
    else if (alive == 1)
      mix_one(live, n, shift, out, streaming);
    else if (alive == 2)
      mix_two(live, live + 1, n, shift, out, streaming);
    else
      mix_many(live, alive, n, shift, out, streaming);
    begin = stop;
    out += n;
  }
  if (streaming) stream_fence();
}
