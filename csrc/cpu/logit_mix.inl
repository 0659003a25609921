// The mixture of a row written out: log sum_k exp(term_k). Derivation and numerics are in
// mdkernels/ops/logit_mix/README.md. Included inside an anonymous namespace.

// (x - max) * scale + offset: the subtraction comes first because it is nearly exact, also for
// logits around 1e4.
struct MixAffine {
  vf max, scale, offset;
  MDK_INLINE vf operator()(vf x) const { return vfma(x - max, scale, offset); }
};
MDK_INLINE MixAffine mix_affine(const MdkMixTerm* term) {
  return MixAffine{vset(term->max), vset(term->scale), vset(term->offset)};
}

// log(e^a + e^b). Two -inf give -inf: the finite floor keeps their difference from being NaN.
MDK_INLINE vf vlogaddexp(vf a, vf b) {
  const vf high = vmax(a, b), low = vmin(a, b);
  const vf ratio = vexp2((low - vmax(high, vset(kLowest))) * vset(kLog2E));
  return high + vlog1p_unit(ratio);
}

struct MixPair {
  MixAffine f, g;
  vf shift;
  MDK_INLINE vf operator()(vf a, vf b) const { return vlogaddexp(f(a), g(b)) + shift; }
};
struct MixSingle {
  MixAffine f;
  vf shift;
  MDK_INLINE vf operator()(vf a, vf) const { return f(a) + shift; }
};

// out[0, n) = body(a[0, n), b[0, n)), with stores that bypass the caches if `streaming`.
template <bool streaming, class A, class B, class Body>
MDK_INLINE void mix_map(const A* a, const B* b, int64_t n, float* out, Body body) {
  int64_t i = 0;
  if (streaming) {  // such a store needs an aligned address
    constexpr uintptr_t line = 64 / sizeof(float);
    const int64_t misaligned = (int64_t)((0 - (uintptr_t)out / sizeof(float)) % line);
    const int64_t head = misaligned < n ? misaligned : n;
    while (i < head) {
      const int64_t size = head - i < W ? head - i : W;
      const vf y = body(load1_part(a + i, size, 0.0f), load1_part(b + i, size, 0.0f));
      store1_part(out + i, size, y);
      i += size;
    }
  }
  for (; i + W <= n; i += W) {
    const vf y = body(load1(a + i), load1(b + i));
    if (streaming)
      vstream(out + i, y);
    else
      vstore(out + i, y);
  }
  if (i < n) {
    const vf y = body(load1_part(a + i, n - i, 0.0f), load1_part(b + i, n - i, 0.0f));
    store1_part(out + i, n - i, y);
  }
}
template <class A, class B, class Body>
MDK_INLINE void mix_map_to(const A* a, const B* b, int64_t n, float* out, int streaming,
                           Body body) {
  if (streaming)
    mix_map<true>(a, b, n, out, body);
  else
    mix_map<false>(a, b, n, out, body);
}

template <class A, class B>
void mix_pair(const MdkMixTerm* s, const MdkMixTerm* t, int64_t n, float shift, float* out,
              int streaming) {
  const MixPair body = {mix_affine(s), mix_affine(t), vset(shift)};
  mix_map_to((const A*)s->row, (const B*)t->row, n, out, streaming, body);
}
template <class A>
void mix_pair_of(const MdkMixTerm* s, const MdkMixTerm* t, int64_t n, float shift, float* out,
                 int streaming) {
  if (t->dtype == MDK_F32)
    mix_pair<A, float>(s, t, n, shift, out, streaming);
  else if (t->dtype == MDK_BF16)
    mix_pair<A, bf16_t>(s, t, n, shift, out, streaming);
  else
    mix_pair<A, f16_t>(s, t, n, shift, out, streaming);
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
  const MixSingle body = {mix_affine(s), vset(shift)};
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
