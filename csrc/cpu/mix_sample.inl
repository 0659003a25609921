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

int64_t mix_collect(const float* scores, int64_t n, float low, float high, int32_t* ids,
                    float* kept) {
  int64_t count = 0;
  const vf from = vset(low), to = vset(high);
  for (int64_t i = 0; i < n; i += W) {
    const vf s = load_scores(scores + i, n - i);
    uint32_t mask = vmask_ge(s, from) & ~vmask_ge(s, to);
    if (n - i < W) mask &= (1u << (n - i)) - 1;  // the padding may equal a bound of -inf
    for (; mask; mask &= mask - 1) {
      const int64_t id = i + __builtin_ctz(mask);
      ids[count] = (int32_t)id;
      kept[count++] = scores[id];
    }
  }
  return count;
}

void mix_mass_above(const float* scores, int64_t n, float max, float scale, const float* bounds,
                    double* mass) {
  const vf reference = vset(max), k = vset(scale * kLog2E);
  vf limits[kMixBounds];
  for (int t = 0; t < kMixBounds; ++t) {
    limits[t] = vset(bounds[t]);
    mass[t] = 0.0;
  }
  for (int64_t block = 0; block < n; block += kMixBlock) {
    const int64_t stop = n - block < kMixBlock ? n : block + kMixBlock;
    vf sums[kMixBounds], s[kInStep], q[kInStep];
    for (int t = 0; t < kMixBounds; ++t) sums[t] = vset(0.0f);
    for (int64_t i = block; i < stop; i += kInStep * W) {
      for (int u = 0; u < kInStep; ++u) s[u] = load_scores(scores + i + u * W, stop - i - u * W);
      for (int u = 0; u < kInStep; ++u) q[u] = (s[u] - reference) * k;
      vexp2_each<kInStep>(q);
      for (int t = 0; t < kMixBounds; ++t)
        for (int u = 0; u < kInStep; ++u) sums[t] = vadd_where_ge(s[u], limits[t], sums[t], q[u]);
    }
    for (int t = 0; t < kMixBounds; ++t) mass[t] += (double)vhsum(sums[t]);
  }
}

// E = -log(1 - v) for the 64-bit v = (high + (low + 1/2) / 2^32) / 2^32, clipped below 1.
double mix_exponential(uint64_t seed, uint64_t offset, uint32_t stream, int64_t token) {
  const double high = philox_word(seed, offset, stream, token);
  const double low = philox_word(seed, offset, stream + 1, token);
  const double v = (high + (low + 0.5) * 0x1p-32) * 0x1p-32;
  return -log1p(-(v < 1.0 - 0x1p-53 ? v : 1.0 - 0x1p-53));
}

// E >= v, so a token whose v already exceeds best key * probability cannot win: the logarithm and
// the low word are only computed for the handful that pass.
void mix_race(MdkRace* race, int64_t begin, int64_t end) {
  constexpr int U = 4, kTokens = U * W;  // a quarter of a group at least, never across two
  static_assert(kMixGroup % kTokens == 0, "a step must not cross the end of a group");
  const vf reference = vset(race->max), k = vset(race->scale * kLog2E);
  const vf cutoff = vset(race->cutoff);
  const vf inverse = vset(1.0f / race->max);
  const PhiloxStream stream(race->seed, race->offset, race->stream);
  constexpr double kMargin = 0x1p24 * 1.0001;  // units of 2^-24, and the rounding of q
  vf limit = vset((float)(race->key * kMargin));
  for (int64_t i = begin; i < end; i += kTokens) {
    if (!(race->group_maxima[i / kMixGroup] >= race->cutoff)) continue;
    vf q[U], v[U];
    uint64_t pass = 0;
    for (int u = 0; u < U; ++u) q[u] = load_scores(race->scores + i + u * W, end - i - u * W);
    for (int u = 0; u < U; ++u) pass |= (uint64_t)vmask_ge(q[u], cutoff) << u * W;
    if (pass == 0) continue;
    if (race->linear) {
      for (int u = 0; u < U; ++u) q[u] = q[u] * inverse;
    } else {
      for (int u = 0; u < U; ++u) q[u] = (q[u] - reference) * k;
      vexp2_each<U>(q);
    }
    stream.high24<U / 2>(i, v);
    uint64_t fast = 0;
    for (int u = 0; u < U; ++u) fast |= (uint64_t)vmask_ge(q[u] * limit, v[u]) << u * W;
    pass &= fast;
    if (pass == 0) continue;
    float shares[kTokens];
    for (int u = 0; u < U; ++u) vstore(shares + u * W, q[u]);
    for (; pass; pass &= pass - 1) {
      const int lane = __builtin_ctzll(pass);
      const int64_t token = i + lane;
      if (token >= end) break;
      if (race->scores[token] == race->cutoff && token > race->last_tie) continue;
      if (!(shares[lane] > 0.0f)) continue;
      const double e = mix_exponential(race->seed, race->offset, race->stream, token);
      const double key = e / (double)shares[lane];
      if (key < race->key || (key == race->key && token < race->token)) {
        race->key = key;
        race->token = token;
      }
    }
    limit = vset((float)(race->key * kMargin));
  }
}
