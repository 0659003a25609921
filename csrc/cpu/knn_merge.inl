// Adding up the weights of equal tokens in one knn_targets row; included inside an anonymous
// namespace. A hash table alone spends its time on mispredicted branches and on sums that wait for
// each other, so frequent tokens are taken out first and the last few pairs are merged by counting.
#pragma once
#include "knn_take.inl"

typedef int32_t vtoken __attribute__((vector_size(4 * W)));

constexpr int64_t kFewPairs = 64;

// At most kFewPairs pairs: the number of smaller tokens is a place that equal tokens share. Places
// that nobody takes have sum 0. Returns n.
MDK_INLINE int64_t merge_few(const int32_t* tokens, const float* weights, int64_t n,
                             int32_t* entries, double* sums) {
  int32_t places[kFewPairs];
  for (int64_t base = 0; base < n; base += W) {
    vtoken t, smaller = {};
    memcpy(&t, tokens + base, sizeof t);
    for (int64_t j = 0; j < n; ++j) smaller -= tokens[j] < t;  // a comparison is -1 where it holds
    memcpy(places + base, &smaller, sizeof smaller);
  }
  for (int64_t i = 0; i < n; ++i) sums[i] = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    entries[places[i]] = tokens[i];
    sums[places[i]] += (double)weights[i];
  }
  return n;
}

// Any number of pairs, through the hash table. Returns the number of distinct tokens.
MDK_INLINE int64_t merge_many(MdkKnnScratch* s, int64_t n, int32_t* entries, double* sums) {
  const uint32_t mask = (uint32_t)((uint64_t(1) << (32 - s->table_shift)) - 1);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t token = s->tokens[i];
    uint32_t h = (uint32_t)token * 2654435769u >> s->table_shift;
    while (s->table[h].token != token) {
      if (s->table[h].token < 0) {
        s->table[h] = MdkTokenSlot{token, (int32_t)count};
        s->slots[count] = (int32_t)h;
        entries[count] = token;
        sums[count++] = 0.0;
        break;
      }
      h = (h + 1) & mask;
    }
    sums[s->table[h].entry] += (double)s->weights[i];
  }
  for (int64_t e = 0; e < count; ++e) s->table[s->slots[e]].token = -1;
  return count;
}

// keys <- the first distinct tokens among 16, filled up with -1, which no token is.
MDK_INLINE int first_tokens(const int32_t* tokens, int32_t* keys) {
  int found = 0;
  for (int i = 0; i < 16 && found < kTaken; ++i) {
    bool known = false;
    for (int k = 0; k < found; ++k) known |= keys[k] == tokens[i];
    if (!known) keys[found++] = tokens[i];
  }
  for (int k = found; k < kTaken; ++k) keys[k] = -1;
  return found;
}

// entries, sums <- the distinct tokens of the n (s->tokens, s->weights) pairs and their weights; an
// entry may have weight 0. Returns the number of entries; the pairs are used up.
template <class Id>
MDK_INLINE int64_t knn_merge(MdkKnnScratch* s, int64_t n, ValueRequests<Id>* requests) {
  int64_t count = 0;
  int patience = kCanTake ? 3 : 0;
  while (n > kFewPairs && patience > 0) {
    int32_t keys[kTaken];
    const int found = first_tokens(s->tokens, keys);
    const int64_t left = take_tokens(s->tokens, s->weights, n, keys, s->sums + count, requests);
    memcpy(s->entries + count, keys, sizeof keys);
    count += found;
    // A pass over n pairs that takes fewer than this costs more than hashing them.
    patience -= n - left < 16 + n / 32;
    n = left;
  }
  request_values(requests, requests->end);
  int32_t* entries = s->entries + count;
  double* sums = s->sums + count;
  if (n <= kFewPairs) return count + merge_few(s->tokens, s->weights, n, entries, sums);
  return count + merge_many(s, n, entries, sums);
}
