// Sorting the entries of one knn_targets row; included inside an anonymous namespace.
#pragma once

typedef int64_t vkey __attribute__((vector_size(4 * W)));

constexpr int64_t kRankBlock = 64;

// Sorts n <= kRankBlock distinct keys descending by counting, for each, the greater ones: no branch
// to mispredict. Reads up to W keys beyond the last.
MDK_INLINE void rank_sort(const int64_t* keys, int64_t* out, int64_t n) {
  constexpr int64_t lanes = W / 2;
  for (int64_t base = 0; base < n; base += 2 * lanes) {
    vkey a, b, a_rank = {}, b_rank = {};
    memcpy(&a, keys + base, sizeof a);
    memcpy(&b, keys + base + lanes, sizeof b);
    for (int64_t j = 0; j < n; ++j) {
      a_rank -= keys[j] > a;  // a comparison is -1 where it holds
      b_rank -= keys[j] > b;
    }
    int64_t rank[2 * lanes];
    memcpy(rank, &a_rank, sizeof a_rank);
    memcpy(rank + lanes, &b_rank, sizeof b_rank);
    const int64_t valid = n - base < 2 * lanes ? n - base : 2 * lanes;
    for (int64_t lane = 0; lane < valid; ++lane) out[rank[lane]] = keys[base + lane];
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
