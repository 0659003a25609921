// An fp32 sum held as two planes of 16 bits: `high` are bfloat16 numbers (cut, not rounded), `low`
// what is missing below them. So the result can grow in the memory of a bfloat16 tensor, and only
// `low` is scratch (mdkernels/ops/linear_sparse_kl/README.md). Included inside an anonymous
// namespace; plain loops that the compiler vectorises for each instruction set.

MDK_INLINE uint32_t split_add(uint32_t sum, uint16_t term) {
  const uint32_t wide = (uint32_t)term << 16;
  float a, b;
  memcpy(&a, &sum, 4);
  memcpy(&b, &wide, 4);
  a += b;
  memcpy(&sum, &a, 4);
  return sum;
}

// To the nearest bfloat16, ties to even. A carry must not turn NaN into infinity or zero.
MDK_INLINE uint16_t split_round(uint32_t sum) {
  const bool nan = (sum & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (sum + 0x7fffu + ((sum >> 16) & 1u)) >> 16;
  return (uint16_t)(nan ? (sum >> 16) | 0x40u : rounded);
}

MDK_INLINE void split_sum_body(uint16_t* high, uint16_t* low, const uint16_t* product, int64_t n,
                               bool low_known, bool last) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t before = (uint32_t)high[i] << 16 | (low_known ? low[i] : 0u);
    const uint32_t sum = split_add(before, product[i]);
    high[i] = last ? split_round(sum) : (uint16_t)(sum >> 16);
    if (!last) low[i] = (uint16_t)sum;
  }
}

// `low_known` = 0: the sum so far is in `high` alone. `last` = 1: `high` becomes the rounded sum
// and `low` is not written.
void split_sum(uint16_t* __restrict__ high, uint16_t* __restrict__ low,
               const uint16_t* __restrict__ product, int64_t n, int low_known, int last) {
  if (low_known)
    last ? split_sum_body(high, low, product, n, true, true)
         : split_sum_body(high, low, product, n, true, false);
  else
    last ? split_sum_body(high, low, product, n, false, true)
         : split_sum_body(high, low, product, n, false, false);
}
