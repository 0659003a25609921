// knn_targets, one row: softmax of the negated distances, merged by token, sorted. The derivation
// is in mdkernels/ops/knn_targets/README.md. Included inside an anonymous namespace.

#include "knn_requests.inl"

#include "knn_merge.inl"
#include "knn_sort.inl"

constexpr float kSmallestNormal = 1.17549435e-38f;

template <class Id>
MDK_INLINE int64_t knn_fault(MdkKnnScratch* s, MdkKnnFault what, int64_t column, Id value) {
  s->fault_column = column;
  s->fault_value = (int64_t)value;
  return what;
}

// weights <- the distance of each neighbour that counts, infinity for the others. *spare <- the id
// of some neighbour if another was not found, else -1.
template <class Id>
MDK_INLINE int64_t knn_select(const MdkKnnTargets* a, MdkKnnScratch* s, int64_t row, const Id* ids,
                              int64_t* spare) {
  const float* __restrict__ distances = a->distances + row * a->distance_stride;
  const int64_t own = a->exclude_ids ? a->exclude_ids[row] : -1, count = a->neighbors;
  float* __restrict__ out = s->weights;
  // Two loops without a branch, in the form that compilers turn into vector code.
  Id low = 0, high = -1;
  for (int64_t i = 0; i < count; ++i) {
    low = ids[i] < low ? ids[i] : low;
    high = ids[i] > high ? ids[i] : high;
  }
  if (low < -1 || high >= a->num_values)
    for (int64_t i = 0;; ++i)
      if (ids[i] < -1 || ids[i] >= a->num_values) return knn_fault(s, MDK_KNN_ID, i, ids[i]);
  *spare = low < 0 ? high : -1;

  const uint32_t infinity = 0x7f800000;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = ids[i];
    const uint32_t counts = -(uint32_t)((id >= 0) & (id != own));
    uint32_t bits;
    memcpy(&bits, distances + i, 4);
    bits = (bits & counts) | (infinity & ~counts);
    memcpy(out + i, &bits, 4);
  }
  return 0;
}

// weights <- exp((nearest - distance) / temperature). Returns 1, or 0 if no neighbour is at a
// finite distance, or a fault. Meanwhile the next row is requested: left to the hardware, reading
// it takes as long as the rest.
template <class Id>
MDK_INLINE int64_t knn_weigh(const MdkKnnTargets* a, MdkKnnScratch* s, int64_t row, const Id* ids,
                             ValueRequests<Id>* requests) {
  float* w = s->weights;
  for (int64_t i = a->neighbors; i % W != 0 || i == 0; ++i) w[i] = INFINITY;
  const vf largest = vset(-kLowest), zero = vset(0.0f);
  vf low = vset(INFINITY), poison = zero;
  for (int64_t i = 0; i < a->neighbors; i += W) {
    const vf x = vload(w + i);
    low = vmin(x, low);
    poison = vfma(vat_most(largest, x), zero, poison);  // NaN for NaN and -inf, which +inf is not
  }
  if (vhsum(poison) != 0.0f)
    for (int64_t i = 0;; ++i)
      if (!(w[i] > -INFINITY)) return knn_fault(s, MDK_KNN_DISTANCE, i, ids[i]);
  const float nearest = -vhmax(zero - low);
  if (!(nearest < INFINITY)) return 0;
  const vf reference = vset(nearest), scale = vset(a->scale);
  const int64_t ahead = row + 1 < a->rows ? 1 : 0;
  const float* next_distances = a->distances + (row + ahead) * a->distance_stride;
  const Id* next_ids = ids + ahead * a->id_stride;
  for (int64_t i = 0; i < a->neighbors; i += W) {
    __builtin_prefetch(next_distances + i);
    for (int64_t line = 0; line < W; line += 64 / (int64_t)sizeof(Id))
      __builtin_prefetch(next_ids + i + line);
    request_values(requests, W / 4);
    vstore(w + i, vexp2((reference - vload(w + i)) * scale));
  }
  return 1;
}

// tokens <- those of the neighbours. One that was not found takes the token of entry `spare`; its
// weight is 0, so that later steps need not tell it apart.
template <class Id, class Value>
MDK_INLINE int64_t knn_gather(const MdkKnnTargets* a, MdkKnnScratch* s, const Id* ids,
                              int64_t spare, ValueRequests<Id>* requests) {
  const Value* values = (const Value*)a->values;
  const int64_t count = a->neighbors;
  uint64_t bits = 0;
  if (spare < 0) {
    constexpr int64_t block = 16;
    for (int64_t begin = 0; begin < count; begin += block) {
      const int64_t end = count - begin < block ? count : begin + block;
      request_values(requests, 6);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t value = values[ids[i]];
        bits |= (uint64_t)value;
        s->tokens[i] = (int32_t)value;
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t value = values[ids[i] < 0 ? spare : (int64_t)ids[i]];
      bits |= (uint64_t)value;
      s->tokens[i] = (int32_t)value;
    }
  }
  if (bits <= INT32_MAX) return 0;
  for (int64_t i = 0;; ++i)
    if (ids[i] >= 0 && (uint64_t)(int64_t)values[ids[i]] > INT32_MAX)
      return knn_fault(s, MDK_KNN_TOKEN, i, values[ids[i]]);
}

// keys <- one integer per entry that sorts by probability, then by descending token; returns how
// many have a probability that fp32 holds as a normal number.
MDK_INLINE int64_t knn_normalize(MdkKnnScratch* s, int64_t count) {
  constexpr int64_t lanes = 4;
  double totals[lanes] = {};
  for (int64_t e = count; e % lanes != 0; ++e) s->sums[e] = 0.0;
  for (int64_t e = 0; e < count; e += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane) totals[lane] += s->sums[e + lane];
  const double inverse = 1.0 / ((totals[0] + totals[1]) + (totals[2] + totals[3]));
  int64_t kept = 0;
  for (int64_t e = 0; e < count; ++e) {
    const float p = (float)(s->sums[e] * inverse);
    uint32_t bits;
    memcpy(&bits, &p, 4);
    s->keys[kept] = (int64_t)((uint64_t)bits << 32 | (uint32_t)~s->entries[e]);
    kept += p >= kSmallestNormal;
  }
  return kept;
}

template <class Id>
MDK_INLINE int64_t knn_targets_typed(const MdkKnnTargets* a, MdkKnnScratch* s, int64_t row,
                                     int32_t* out_ids, float* out_probs) {
  const Id* ids = (const Id*)a->neighbor_ids + row * a->id_stride;
  int64_t spare;
  if (const int64_t fault = knn_select(a, s, row, ids, &spare)) return fault;
  ValueRequests<Id> requests = value_requests(a, row, ids);
  if (const int64_t found = knn_weigh(a, s, row, ids, &requests); found <= 0) return found;
  const int64_t fault = a->narrow_values ? knn_gather<Id, int32_t>(a, s, ids, spare, &requests)
                                         : knn_gather<Id, int64_t>(a, s, ids, spare, &requests);
  if (fault < 0) return fault;
  const int64_t kept = knn_normalize(s, knn_merge(s, a->neighbors, &requests));
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
