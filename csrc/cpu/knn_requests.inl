// Prefetching the values that the next row will gather; included inside an anonymous namespace.
//
// The values of a large datastore are in DRAM and read at random. A core has a few dozen such reads
// under way at most: 1024 in one go leave the core idle, and then the memory while the rest of the
// row is computed. Requesting a few at a time during all steps of the row before keeps both busy.
#pragma once

// Below this the values are in a cache, and requesting them costs more than it gains.
constexpr int64_t kRequestAbove = int64_t(16) << 20;  // bytes

template <class Id>
struct ValueRequests {
  uintptr_t values;
  uintptr_t value_bytes;
  const Id* ids;  // of the next row; not checked yet, which a prefetch does not mind
  int64_t next, end;
};

template <class Id>
MDK_INLINE ValueRequests<Id> value_requests(const MdkKnnTargets* a, int64_t row, const Id* ids) {
  const int64_t value_bytes = a->narrow_values ? 4 : 8;
  const bool wanted = row + 1 < a->rows && a->num_values > kRequestAbove / value_bytes;
  return {(uintptr_t)a->values, (uintptr_t)value_bytes, wanted ? ids + a->id_stride : ids, 0,
          wanted ? a->neighbors : 0};
}

template <class Id>
MDK_INLINE void request_values(ValueRequests<Id>* r, int64_t n) {
  const int64_t stop = r->end - r->next < n ? r->end : r->next + n;
  for (; r->next < stop; ++r->next)
    __builtin_prefetch((const char*)(r->values + (uintptr_t)r->ids[r->next] * r->value_bytes));
}
