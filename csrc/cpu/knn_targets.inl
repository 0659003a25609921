// knn_targets, one row: softmax of the negated distances, merged by token, sorted. The derivation
// is in mdkernels/ops/knn_targets/README.md. Included inside an anonymous namespace.

constexpr float kSmallestNormal = 1.17549435e-38f;

template <class Id>
MDK_INLINE int64_t knn_fault(MdkKnnScratch* s, MdkKnnFault what, int64_t column, Id value) {
  s->fault_column = column;
  s->fault_value = (int64_t)value;
  return what;
}

// weights <- the distance of each neighbour that counts, infinity for the others.
template <class Id>
MDK_INLINE int64_t knn_select(const MdkKnnTargets* a, MdkKnnScratch* s, int64_t row,
                              const Id* ids) {
  const float* distances = a->distances + row * a->distance_stride;
  const int64_t own = a->exclude_ids ? a->exclude_ids[row] : -1, count = a->neighbors;
  const uint64_t limit = (uint64_t)a->num_values + 1;
  float* out = s->weights;
  bool bad_id = false, bad_distance = false;  // branch-free, so that the loop vectorises
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = ids[i];
    const bool counts = (id >= 0) & (id != own);
    const float d = counts ? distances[i] : INFINITY;
    bad_id |= (uint64_t)(id + 1) >= limit;
    bad_distance |= !(d > -INFINITY);
    out[i] = d;
  }
  if (bad_id)
    for (int64_t i = 0; i < count; ++i)
      if ((uint64_t)((int64_t)ids[i] + 1) >= limit) return knn_fault(s, MDK_KNN_ID, i, ids[i]);
  if (bad_distance)
    for (int64_t i = 0; i < count; ++i)
      if (!(out[i] > -INFINITY)) return knn_fault(s, MDK_KNN_DISTANCE, i, ids[i]);
  return 0;
}

// weights <- exp((nearest - distance) / temperature); false if no neighbour is at a finite
// distance.
MDK_INLINE bool knn_weigh(const MdkKnnTargets* a, MdkKnnScratch* s) {
  float* w = s->weights;
  for (int64_t i = a->neighbors; i % W != 0 || i == 0; ++i) w[i] = INFINITY;
  vf low = vset(INFINITY);
  for (int64_t i = 0; i < a->neighbors; i += W) low = vmin(vload(w + i), low);
  const float nearest = -vhmax(vset(0.0f) - low);
  if (!(nearest < INFINITY)) return false;
  const vf reference = vset(nearest), scale = vset(a->scale);
  for (int64_t i = 0; i < a->neighbors; i += W)
    vstore(w + i, vexp2((reference - vload(w + i)) * scale));
  return true;
}

// Adds the weights of equal tokens. Consecutive neighbours of one token, the common case, go to
// different lanes: the sums would otherwise wait for each other.
template <class Id, class Value>
MDK_INLINE int64_t knn_merge(const MdkKnnTargets* a, MdkKnnScratch* s, const Id* ids) {
  const Value* values = (const Value*)a->values;
  const uint32_t mask = (uint32_t)((uint64_t(1) << (32 - s->table_shift)) - 1);
  int64_t count = 0;
  for (int64_t i = 0; i < a->neighbors; ++i) {
    const float w = s->weights[i];
    if (w < kSmallestNormal) continue;
    const int64_t value = values[ids[i]];
    if ((uint64_t)value > INT32_MAX) {
      for (int64_t e = 0; e < count; ++e) s->table[s->slots[e]].token = -1;
      return knn_fault(s, MDK_KNN_TOKEN, i, value);
    }
    const int32_t token = (int32_t)value;
    uint32_t h = (uint32_t)token * 2654435769u >> s->table_shift;
    while (s->table[h].token != token) {
      if (s->table[h].token < 0) {
        s->table[h] = MdkTokenSlot{token, (int32_t)count};
        s->tokens[count] = token;
        s->slots[count] = (int32_t)h;
        for (int lane = 0; lane < kKnnLanes; ++lane) s->sums[count * kKnnLanes + lane] = 0.0;
        ++count;
        break;
      }
      h = (h + 1) & mask;
    }
    s->sums[(int64_t)s->table[h].entry * kKnnLanes + i % kKnnLanes] += (double)w;
  }
  for (int64_t e = 0; e < count; ++e) s->table[s->slots[e]].token = -1;
  return count;
}

// keys <- one integer per entry that sorts by probability, then by descending token; returns how
// many have a probability that fp32 holds as a normal number.
MDK_INLINE int64_t knn_normalize(MdkKnnScratch* s, int64_t count) {
  double total = 0.0;
  for (int64_t e = 0; e < count; ++e) {
    const double* lanes = s->sums + e * kKnnLanes;
    const double sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    s->sums[e] = sum;
    total += sum;
  }
  int64_t kept = 0;
  for (int64_t e = 0; e < count; ++e) {
    const float p = (float)(s->sums[e] / total);
    uint32_t bits;
    memcpy(&bits, &p, 4);
    s->keys[kept] = (int64_t)((uint64_t)bits << 32 | (uint32_t)~s->tokens[e]);
    kept += p >= kSmallestNormal;
  }
  return kept;
}

constexpr int64_t kRankBlock = 64;

// Sorts n distinct keys descending by counting, for each, the greater ones: no branch to
// mispredict.
MDK_INLINE void rank_sort(const int64_t* keys, int64_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t key = keys[i];
    int64_t rank = 0;
    for (int64_t j = 0; j < n; ++j) rank += keys[j] > key;
    out[rank] = key;
  }
}

MDK_INLINE void merge_runs(const int64_t* in, int64_t* out, int64_t begin, int64_t middle,
                           int64_t end) {
  int64_t left = begin, right = middle, to = begin;
  while (left < middle && right < end) {
    const bool take_left = in[left] > in[right];
    out[to++] = take_left ? in[left] : in[right];
    left += take_left;
    right += !take_left;
  }
  memcpy(out + to, in + left, (size_t)(middle - left) * sizeof *in);
  to += middle - left;
  memcpy(out + to, in + right, (size_t)(end - right) * sizeof *in);
}

// Returns the array, s->keys or s->sorted, that holds the n keys in descending order.
MDK_INLINE const int64_t* knn_sort(MdkKnnScratch* s, int64_t n) {
  for (int64_t i = 0; i < n; i += kRankBlock)
    rank_sort(s->keys + i, s->sorted + i, n - i < kRankBlock ? n - i : kRankBlock);
  int64_t *from = s->sorted, *to = s->keys;
  for (int64_t run = kRankBlock; run < n; run *= 2) {
    for (int64_t begin = 0; begin < n; begin += 2 * run) {
      const int64_t middle = begin + run < n ? begin + run : n;
      merge_runs(from, to, begin, middle, middle + run < n ? middle + run : n);
    }
    int64_t* const swap = from;
    from = to;
    to = swap;
  }
  return from;
}

template <class Id>
MDK_INLINE int64_t knn_targets_typed(const MdkKnnTargets* a, MdkKnnScratch* s, int64_t row,
                                     int32_t* out_ids, float* out_probs) {
  const Id* ids = (const Id*)a->neighbor_ids + row * a->id_stride;
  if (const int64_t fault = knn_select(a, s, row, ids)) return fault;
  if (!knn_weigh(a, s)) return 0;
  const int64_t merged =
      a->narrow_values ? knn_merge<Id, int32_t>(a, s, ids) : knn_merge<Id, int64_t>(a, s, ids);
  if (merged < 0) return merged;
  const int64_t kept = knn_normalize(s, merged);
  const int64_t* sorted = knn_sort(s, kept);
  for (int64_t i = 0; i < kept; ++i) {
    const uint32_t bits = (uint32_t)((uint64_t)sorted[i] >> 32);
    out_ids[i] = (int32_t)~(uint32_t)sorted[i];
    memcpy(out_probs + i, &bits, 4);
  }
  return kept;
}

int64_t knn_targets(const MdkKnnTargets* a, MdkKnnScratch* s, int64_t row, int32_t* out_ids,
                    float* out_probs) {
  return a->narrow_ids ? knn_targets_typed<int32_t>(a, s, row, out_ids, out_probs)
                       : knn_targets_typed<int64_t>(a, s, row, out_ids, out_probs);
}
