// sparse_kl on a range of rows: loss, gradient, or both in one visit. The derivation is in
// mdkernels/ops/sparse_kl/README.md; names follow it. Included inside an anonymous namespace.

MDK_INLINE float load_prob(const void* probs, int dtype, int64_t i) {
  if (dtype == MDK_F32) return ((const float*)probs)[i];
  if (dtype == MDK_BF16) return to_float(((const bf16_t*)probs)[i]);
  return to_float(((const f16_t*)probs)[i]);
}

// Index of `id` among the merged targets of this row, appended with probability 0 if new.
template <class T>
MDK_INLINE int32_t find_or_add(MdkSparseKLScratch* s, const T* x, int32_t id, int32_t* count) {
  uint32_t h = (uint32_t)id * 2654435769u;
  h = (h ^ (h >> 15)) & s->table_mask;
  while (s->table[h].stamp == s->stamp) {
    if (s->table[h].id == id) return s->table[h].entry;
    h = (h + 1) & s->table_mask;
  }
  const int32_t entry = (*count)++;
  s->table[h] = MdkSlot{id, entry, s->stamp};
  s->ids[entry] = id;
  s->probs[entry] = 0.0f;
  // The logit is fetched now: an in-place gradient overwrites it.
  s->logits[entry] = to_float(x[id]);
  return entry;
}

template <class T>
MDK_INLINE void fill_zero(T* row, int64_t n) {
  memset(row, 0, (size_t)n * sizeof(T));
}

// out <- scale * exp(x - max), for a backward pass that knows the log-sum-exp.
template <bool fused, class T>
MDK_INLINE void write_softmax_by(const T* x, T* out, int64_t n, const Exponent& exponent,
                                 vf factor) {
  vf v[2];
  for (int64_t i = 0; i < n; i += 2 * W) {
    const bool whole = i + 2 * W <= n;
    if (whole) {
      prefetch_ahead(x + i, 2 * W);
      load2(x + i, v, v + 1);
    } else {
      load2_tail(x + i, n - i, -INFINITY, v, v + 1);
    }
    exponent.raise<fused, 2>(v, factor);
    if (whole)
      store2(out + i, v[0], v[1]);
    else
      store2_tail(out + i, n - i, v[0], v[1]);
  }
}
template <class T>
MDK_INLINE void write_softmax(const T* x, T* out, int64_t n, float max, float scale) {
  const Exponent exponent(max, 1.0f);
  const vf factor = vset((float)((double)scale / exponent.unit));
  if (exponent.in_range)
    write_softmax_by<kFused>(x, out, n, exponent, factor);
  else
    write_softmax_by<false>(x, out, n, exponent, factor);
}

// A row of exponentials as row_sum_exp keeps them, on its way to the gradient
// out = scale * exp(reference - max) / unit * kept.
template <class T>
struct KeptRow {
  const float* kept;
  T* out;
  float max, scale;
  float factor_of;  // the reference that `factor` is for
  vf factor;
  int64_t start;  // of the current block

  MDK_INLINE void block(int64_t begin, float reference) {
    start = begin;
    if (reference == factor_of) return;  // nearly always
    const double shift = exp((double)reference - (double)max);
    factor = vset((float)((double)scale * shift / Exponent(reference, 1.0f).unit));
    factor_of = reference;
  }
  // The pair of vectors at element i of the block, of which `left` elements are the row's.
  MDK_INLINE void pair(int64_t i, int64_t left) const {
    vf a, b;
    if (left >= 2 * W) {
      load2(kept + start + i, &a, &b);
      store2(out + start + i, a * factor, b * factor);
      return;
    }
    if (keeps_in_row(out))
      load2_tail(kept + start + i, left, 0.0f, &a, &b);
    else
      load2(kept + start + i, &a, &b);
    store2_tail(out + start + i, left, a * factor, b * factor);
  }
};

template <class T>
MDK_INLINE void write_kept(KeptRow<T> row, const float* references, int64_t n) {
  for (int64_t start = 0; start < n; start += kLseBlock) {
    row.block(start, references[start / kLseBlock]);
    const int64_t size = n - start < kLseBlock ? n - start : kLseBlock;
    for (int64_t i = 0; i < size; i += 2 * W) row.pair(i, size - i);
  }
}

// work <- the entries of dz at the targets, in fp32 from the original logits.
MDK_INLINE void target_gradients(const MdkSparseKLScratch* s, int32_t count, int32_t gold,
                                 float max, float scale, float kl_coef, float ce_coef) {
  for (int32_t i = 0; i < count; i += W) {
    const vf z = vload(s->logits + i), p = vload(s->probs + i);
    const vf dense = vexp2_scaled((z - vset(max)) * vset(kLog2E), vset(scale));
    vstore(s->work + i, dense - vset(kl_coef) * p);
  }
  if (gold >= 0) s->work[gold] -= ce_coef;
}

// Rounds them, once, over what the dense pass left there.
template <class T>
MDK_INLINE void correct_targets(const int32_t* ids, const float* values, int32_t count, T* grad) {
  for (int32_t i = 0; i < count; ++i) from_float(values[i], grad + ids[i]);
}

// A row of 16-bit logits whose exponentials are still in scratch: its gradient is written while the
// next row is summed up, and the latter's exponentials take the place of those that were read. The
// sum is bound by arithmetic and the gradient by the second-level cache, so one hides the other:
// 512 x 50257 bf16 rows in place take 2.7 instead of 3.3 ms on two Zen 4 cores.
template <class T>
struct LateRow {
  KeptRow<T> row = {};
  int32_t count = -1;  // of targets, whose gradients are in late_ids and late_work; -1: no row

  // The targets of the next row go where those of the last one were.
  MDK_INLINE void hold(MdkSparseKLScratch* s, const KeptRow<T>& kept, int32_t targets) {
    row = kept;
    count = targets;
    int32_t* const ids = s->ids;
    s->ids = s->late_ids;
    s->late_ids = ids;
    float* const work = s->work;
    s->work = s->late_work;
    s->late_work = work;
  }
  MDK_INLINE void correct(const MdkSparseKLScratch* s) {
    correct_targets(s->late_ids, s->late_work, count, row.out);
    count = -1;
  }
};

MDK_INLINE double sparse_kl_loss(const MdkSparseKLScratch* s, int32_t count, double log_normalizer,
                                 float max) {
  for (int32_t i = 0; i < count; i += W) vstore(s->work + i, vlog(vload(s->probs + i)));
  double kl = 0.0;
  for (int32_t i = 0; i < count; ++i) {
    const double p = s->probs[i];
    const double logprob = ((double)s->logits[i] - (double)max) - log_normalizer;
    if (p > 0.0)
      kl += p * ((double)s->work[i] - logprob);
    else if (!(p == 0.0))
      kl = NAN;  // a negative or NaN probability
  }
  return kl;
}

// The merged targets of a row into the scratch, the label among them. Returns how many.
template <class T>
MDK_INLINE int32_t gather_targets(const MdkSparseKL* a, MdkSparseKLScratch* s, const T* x,
                                  int64_t row, int32_t* gold, float* mass) {
  int32_t count = 0;
  *gold = -1;
  *mass = 0.0f;
  if (++s->stamp == 0) {  // wrapped after 2^32 rows: old stamps could look current
    memset(s->table, 0, ((size_t)s->table_mask + 1) * sizeof(MdkSlot));
    s->stamp = 1;
  }
  if (a->row_offsets) {
    double total = 0.0;
    for (int64_t i = a->row_offsets[row]; i < a->row_offsets[row + 1]; ++i) {
      const float p = load_prob(a->probs, a->probs_dtype, i);
      s->probs[find_or_add(s, x, a->token_ids[i], &count)] += p;
      total += (double)p;
    }
    *mass = (float)total;
  }
  if (a->labels) *gold = find_or_add(s, x, (int32_t)a->labels[row], &count);
  for (int i = 0; i < W; ++i) {  // the slack that completes the last vector
    s->probs[count + i] = 0.0f;
    s->logits[count + i] = 0.0f;
  }
  return count;
}

// The logits of a row's targets lie all over it: their lines are asked for a row ahead.
template <class T>
MDK_INLINE void prefetch_targets(const MdkSparseKL* a, int64_t row) {
  const T* x = (const T*)a->logits + row * a->row_stride;
  if (a->labels && a->labels[row] != a->ignore_index) __builtin_prefetch(x + a->labels[row], 0, 2);
  if (!a->row_offsets) return;
  for (int64_t i = a->row_offsets[row]; i < a->row_offsets[row + 1]; ++i)
    __builtin_prefetch(x + a->token_ids[i], 0, 2);
}

template <class T>
void sparse_kl_typed(const MdkSparseKL* a, MdkSparseKLScratch* s, int64_t begin, int64_t end) {
  LateRow<T> late;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)a->logits + row * a->row_stride;
    T* grad = a->grad ? (T*)a->grad + row * a->grad_stride : nullptr;
    const bool ignored = a->labels && a->labels[row] == a->ignore_index;
    if (ignored) {
      if (grad) fill_zero(grad, a->vocab);
      if (a->kl && !a->grad_only) a->kl[row] = 0.0f;
      if (a->ce && !a->grad_only) a->ce[row] = 0.0f;
      if (a->lse && !a->grad_only) a->lse[row] = 0.0;
      continue;
    }

    int32_t gold;
    float mass;
    const int32_t count = gather_targets(a, s, x, row, &gold, &mass);
    if (row + 1 < end) prefetch_targets<T>(a, row + 1);

    float* kept = keeps_in_row(x) && grad ? (float*)grad : s->kept;
    float max;
    double log_normalizer;  // lse - max
    // Beyond 1e8 (a row of the lowest finite logits) lse = max + log(sum) has lost the second term.
    if (a->grad_only && fabs(a->lse[row]) < 1e8) {
      max = (float)a->lse[row];
      log_normalizer = a->lse[row] - (double)max;
    } else {
      SumExp acc;
      if (!grad || a->grad_only) {
        acc = row_sum_exp<false>(x, a->vocab, kept, s->references, NoDrain());
      } else if (!keeps_in_row(x) && late.count >= 0) {
        acc = row_sum_exp<true>(x, a->vocab, kept, s->references, late.row);
        late.correct(s);
      } else {
        acc = row_sum_exp<true>(x, a->vocab, kept, s->references, NoDrain());
      }
      max = acc.max;
      log_normalizer = log(acc.sum);
      if (a->lse && !a->grad_only) a->lse[row] = (double)max + log_normalizer;
      if (a->kl) a->kl[row] = (float)sparse_kl_loss(s, count, log_normalizer, max);
      if (a->ce)
        a->ce[row] =
            gold < 0 ? 0.0f : (float)(log_normalizer - ((double)s->logits[gold] - (double)max));
    }
    if (!grad) continue;
    const float kl_coef = a->kl_coef[row], ce_coef = gold < 0 ? 0.0f : a->ce_coef[row];
    const float scale = (float)(((double)kl_coef * mass + ce_coef) * exp(-log_normalizer));
    if (!(fabsf(scale) < INFINITY)) {  // NaN or infinite logits, or all -inf: the whole row is NaN
      for (int64_t i = 0; i < a->vocab; ++i) from_float(NAN, grad + i);
      continue;
    }
    target_gradients(s, count, gold, max, scale, kl_coef, ce_coef);
    const KeptRow<T> exponentials = {kept, grad, max, scale, NAN, vset(0.0f), 0};
    if (!a->grad_only && !keeps_in_row(x)) {
      late.hold(s, exponentials, count);
      continue;
    }
    if (a->grad_only)
      write_softmax(x, grad, a->vocab, max, scale);
    else
      write_kept(exponentials, s->references, a->vocab);
    correct_targets(s->ids, s->work, count, grad);
  }
  if (late.count >= 0) {
    write_kept(late.row, s->references, a->vocab);
    late.correct(s);
  }
}

void sparse_kl(const MdkSparseKL* a, MdkSparseKLScratch* s, int64_t begin, int64_t end) {
  if (a->dtype == MDK_F32)
    sparse_kl_typed<float>(a, s, begin, end);
  else if (a->dtype == MDK_BF16)
    sparse_kl_typed<bf16_t>(a, s, begin, end);
  else
    sparse_kl_typed<f16_t>(a, s, begin, end);
}
