// Drawing from a row of scores: the passes over the vocabulary. Derivation and the exact mapping
// from random bits to exponentials are in mdkernels/ops/mix_sample/README.md; selection among the
// few survivors of a filter is mix_filter.cpp. Included inside an anonymous namespace.

MDK_INLINE vf load_scores(const float* p, int64_t n) {
  return n >= W ? vload(p) : load1_part(p, n > 0 ? n : 0, -INFINITY);
}

void mix_group_max(const float* scores, int64_t n, float* maxima) {
  for (int64_t i = 0; i < n; i += kMixGroup) {
    vf best = vset(-INFINITY);
    for (int64_t j = i; j < i + kMixGroup && j < n; j += W)
      best = vmax(load_scores(scores + j, n - j), best);
    maxima[i / kMixGroup] = vhmax(best);
  }
}

int64_t mix_collect(const float* scores, int64_t n, float bound, int32_t* ids, int64_t capacity) {
  int64_t count = 0;
  const vf limit = vset(bound);
  for (int64_t i = 0; i < n; i += W) {
    uint32_t mask = vmask_ge(load_scores(scores + i, n - i), limit);
    if (n - i < W) mask &= (1u << (n - i)) - 1;  // the padding may equal a bound of -inf
    for (; mask; mask &= mask - 1) {
      if (count < capacity) ids[count] = (int32_t)(i + __builtin_ctz(mask));
      ++count;
    }
  }
  return count;
}

void mix_mass_above(const float* scores, int64_t n, float max, float scale, const float* bounds,
                    int count, double* mass, int64_t* tokens) {
  constexpr int kMost = 8;
  const vf reference = vset(max), k = vset(scale * kLog2E);
  for (int t = 0; t < count; ++t) {
    mass[t] = 0.0;
    tokens[t] = 0;
  }
  for (int64_t block = 0; block < n; block += kMixBlock) {
    const int64_t stop = n - block < kMixBlock ? n : block + kMixBlock;
    vf sums[kMost], counts[kMost];
    for (int t = 0; t < count; ++t) sums[t] = counts[t] = vset(0.0f);
    for (int64_t i = block; i < stop; i += W) {
      const vf s = load_scores(scores + i, stop - i);
      const vf q = vexp2((s - reference) * k);
      for (int t = 0; t < count; ++t) {
        const vf keep = vone_where_ge(s, vset(bounds[t]));
        sums[t] = vfma(keep, q, sums[t]);
        counts[t] += keep;
      }
    }
    for (int t = 0; t < count; ++t) {
      mass[t] += (double)vhsum(sums[t]);
      tokens[t] += (int64_t)vhsum(counts[t]);
    }
  }
}

// E = -log(1 - v) for the 64-bit v = (high + (low + 1/2) / 2^32) / 2^32, clipped below 1.
MDK_INLINE double race_exponential(uint64_t seed, uint64_t offset, int64_t token) {
  const double high = philox_word(seed, offset, 0, token);
  const double low = philox_word(seed, offset, 1, token);
  const double v = (high + (low + 0.5) * 0x1p-32) * 0x1p-32;
  return -log1p(-(v < 1.0 - 0x1p-53 ? v : 1.0 - 0x1p-53));
}

// E >= v, so a token whose v already exceeds best key * probability cannot win: the logarithm and
// the low word are only computed for the handful that pass.
void mix_race(MdkRace* race, int64_t begin, int64_t end) {
  const vf reference = vset(race->max), k = vset(race->scale * kLog2E);
  const vf cutoff = vset(race->cutoff);
  constexpr double kMargin = 0x1p24 * 1.0001;  // units of 2^-24, and the rounding of q
  vf limit = vset((float)(race->key * kMargin));
  for (int64_t i = begin; i < end; i += 2 * W) {
    const vf sa = load_scores(race->scores + i, end - i);
    const vf sb = load_scores(race->scores + i + W, end - i - W);
    const uint32_t kept = vmask_ge(sa, cutoff) | vmask_ge(sb, cutoff) << W;
    if (kept == 0) continue;
    const vf qa = vexp2((sa - reference) * k), qb = vexp2((sb - reference) * k);
    vf ua, ub;
    philox_high24(race->seed, race->offset, i, &ua, &ub);
    uint32_t pass = kept & (vmask_ge(qa * limit, ua) | vmask_ge(qb * limit, ub) << W);
    if (pass == 0) continue;
    float q[2 * W];
    vstore(q, qa);
    vstore(q + W, qb);
    for (; pass; pass &= pass - 1) {
      const int lane = __builtin_ctz(pass);
      const int64_t token = i + lane;
      if (token >= end) break;
      if (race->scores[token] == race->cutoff && token > race->last_tie) continue;
      if (!(q[lane] > 0.0f)) continue;
      const double key = race_exponential(race->seed, race->offset, token) / (double)q[lane];
      if (key < race->key || (key == race->key && token < race->token)) {
        race->key = key;
        race->token = token;
      }
    }
    limit = vset((float)(race->key * kMargin));
  }
}
