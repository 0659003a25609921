// argmax of the mixture without writing it. Lane maxima of both inputs bound every part from above
// (mdkernels/ops/mix_argmax/README.md); only the parts whose bound reaches the best score so far
// are evaluated. Included inside an anonymous namespace.

// One term is compared by its logits; a mixture by sum_k coef_k * exp2((x_k - max_k) * slope_k),
// the probability itself.
struct MixShare {
  float max, slope, coef;
  MDK_INLINE vf operator()(vf x) const {
    return vexp2_scaled((x - vset(max)) * vset(slope), vset(coef));
  }
};

MDK_INLINE vf mix_load(const MdkMixTerm* t, int64_t i, int64_t n) {
  if (t->dtype == MDK_F32) {
    const float* p = (const float*)t->row + i;
    return n >= W ? load1(p) : load1_part(p, n, -INFINITY);
  }
  if (t->dtype == MDK_BF16) {
    const bf16_t* p = (const bf16_t*)t->row + i;
    return n >= W ? load1(p) : load1_part(p, n, -INFINITY);
  }
  const f16_t* p = (const f16_t*)t->row + i;
  return n >= W ? load1(p) : load1_part(p, n, -INFINITY);
}

// Scores of one part into a buffer that is padded with -inf; their maximum is returned.
float mix_part_scores(const MdkMixTerm* terms, const MixShare* shares, int count, int64_t part,
                      float* scores) {
  const int64_t begin = part * kMixPart;
  vf best = vset(-INFINITY);
  for (int64_t i = 0; i < kMixPart; i += W) {
    vf total = vset(count == 1 ? -INFINITY : 0.0f);
    bool any = false;
    for (int k = 0; k < count; ++k) {
      const int64_t left = terms[k].width - (begin + i);
      if (left <= 0) continue;
      const vf x = mix_load(terms + k, begin + i, left);
      total = count == 1 ? x : total + shares[k](x);
      any = true;
    }
    if (!any) total = vset(-INFINITY);
    vstore(scores + i, total);
    best = vmax(total, best);
  }
  return vhmax(best);
}

// An upper bound of the scores of a part. Lanes of different inputs cover the same elements only
// if both were loaded in the same order (vec_io.h).
MDK_INLINE float mix_part_bound(const MdkMixTerm* terms, const MixShare* shares,
                                const float* const* maxima, int count, int64_t part,
                                bool same_lanes) {
  vf total = vset(0.0f);
  for (int k = 0; k < count; ++k) {
    if (terms[k].width <= part * kMixPart) continue;
    vf top = vload(maxima[k] + part * W);
    if (count == 1) return vhmax(top);
    if (!same_lanes) top = vset(vhmax(top));
    total += shares[k](top);
  }
  // exp2 is monotone up to its last bits only.
  return count == 1 ? -INFINITY : vhmax(total) * 1.00001f;
}

void mix_best(const MdkMixTerm* terms, const float* const* maxima, int count, int64_t part_begin,
              int64_t part_end, float* best_score, int64_t* best_id) {
  float scores[kMixPart];
  float score = -INFINITY;
  int64_t id = -1;
  MixShare shares[kMixTerms];
  for (int k = 0; k < count; ++k)
    shares[k] = MixShare{terms[k].max, terms[k].scale * kLog2E, expf(terms[k].offset)};
  bool same_lanes = true;
  for (int k = 1; k < count; ++k)
    same_lanes &= (terms[k].dtype == MDK_BF16) == (terms[0].dtype == MDK_BF16);

  // Starting from the most promising part leaves little to evaluate in the others.
  int64_t first = part_begin;
  float highest = -INFINITY;
  for (int64_t part = part_begin; part < part_end; ++part) {
    const float bound = mix_part_bound(terms, shares, maxima, count, part, same_lanes);
    if (bound > highest) {
      highest = bound;
      first = part;
    }
  }
  if (part_begin < part_end) score = mix_part_scores(terms, shares, count, first, scores);
  for (int64_t part = part_begin; part < part_end; ++part) {
    if (mix_part_bound(terms, shares, maxima, count, part, same_lanes) < score) continue;
    const float top = mix_part_scores(terms, shares, count, part, scores);
    if (top < score || (top == score && id >= 0)) continue;
    score = top;
    for (int64_t i = 0; i < kMixPart; ++i)
      if (scores[i] == top) {
        id = part * kMixPart + i;
        break;
      }
  }
  *best_score = score;
  *best_id = id;
}
