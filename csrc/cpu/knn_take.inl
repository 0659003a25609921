// Taking all occurrences of a few tokens out of a list of (token, weight) pairs, a vector at a
// time. Included inside an anonymous namespace; instruction sets without a cheap way to close the
// gaps in a vector leave kCanTake false and have no take_tokens.
#pragma once

constexpr int kTaken = 4;  // tokens per pass: the pairs are read once for all of them

#if defined(MDK_ISA_AVX512)

constexpr bool kCanTake = true;
typedef __mmask16 vlanes;
MDK_INLINE vlanes first_lanes(int64_t n) { return (vlanes)((1u << n) - 1); }

// Adds the weights of the present lanes that hold key[k] to sum[k], moves the other present lanes
// to position `left` and returns the position behind them.
MDK_INLINE int64_t take_vector(int32_t* tokens, float* weights, int64_t i, int64_t left,
                               vlanes present, const vi* key, vf* sum) {
  const vi t = _mm512_loadu_si512(tokens + i);
  const vf w = vload(weights + i);
  vlanes equal[kTaken];
  for (int k = 0; k < kTaken; ++k) {
    equal[k] = _mm512_mask_cmpeq_epi32_mask(present, t, key[k]);
    sum[k] = _mm512_mask_add_ps(sum[k], equal[k], sum[k], w);
  }
  const vlanes rest = present & ~((equal[0] | equal[1]) | (equal[2] | equal[3]));
  _mm512_storeu_si512(tokens + left, _mm512_maskz_compress_epi32(rest, t));
  vstore(weights + left, _mm512_maskz_compress_ps(rest, w));
  return left + __builtin_popcount(rest);
}
MDK_INLINE vi broadcast_token(int32_t token) { return _mm512_set1_epi32(token); }

#elif defined(MDK_ISA_AVX2)

constexpr bool kCanTake = true;
typedef vi vlanes;
MDK_INLINE vlanes first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// For each set of lanes, their numbers in ascending order, one byte each.
struct LaneTable {
  uint64_t order[256];
  uint8_t size[256];
  constexpr LaneTable() : order(), size() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0; lane < 8; ++lane)
        if (set >> lane & 1) order[set] |= (uint64_t)lane << 8 * size[set]++;
  }
};
constexpr LaneTable kLanes;

MDK_INLINE int64_t take_vector(int32_t* tokens, float* weights, int64_t i, int64_t left,
                               vlanes present, const vi* key, vf* sum) {
  const vi t = _mm256_loadu_si256((const vi*)(tokens + i));
  const vf w = vload(weights + i);
  vi taken = _mm256_setzero_si256();
  for (int k = 0; k < kTaken; ++k) {
    const vi equal = _mm256_and_si256(present, _mm256_cmpeq_epi32(t, key[k]));
    sum[k] += _mm256_and_ps(_mm256_castsi256_ps(equal), w);
    taken = _mm256_or_si256(taken, equal);
  }
  const int rest = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_andnot_si256(taken, present)));
  const vi order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&kLanes.order[rest]));
  _mm256_storeu_si256((vi*)(tokens + left), _mm256_permutevar8x32_epi32(t, order));
  vstore(weights + left, _mm256_permutevar8x32_ps(w, order));
  return left + kLanes.size[rest];
}
MDK_INLINE vi broadcast_token(int32_t token) { return _mm256_set1_epi32(token); }

#elif defined(MDK_ISA_NEON)

constexpr bool kCanTake = true;
typedef uint32x4_t vlanes;
MDK_INLINE vlanes first_lanes(int64_t n) {
  const int32x4_t lane = {0, 1, 2, 3};
  return vcgtq_s32(vdupq_n_s32((int32_t)n), lane);
}

// For each set of lanes, the bytes of those lanes in ascending order.
struct LaneTable {
  uint8_t bytes[16][16];
  uint8_t size[16];
  constexpr LaneTable() : bytes(), size() {
    for (int set = 0; set < 16; ++set)
      for (int lane = 0; lane < 4; ++lane)
        if (set >> lane & 1) {
          for (int i = 0; i < 4; ++i) bytes[set][4 * size[set] + i] = (uint8_t)(4 * lane + i);
          ++size[set];
        }
  }
};
constexpr LaneTable kLanes;

MDK_INLINE int64_t take_vector(int32_t* tokens, float* weights, int64_t i, int64_t left,
                               vlanes present, const vi* key, vf* sum) {
  const vi t = vld1q_s32(tokens + i);
  const vf w = vload(weights + i);
  vlanes rest = present;
  for (int k = 0; k < kTaken; ++k) {
    const vlanes equal = vandq_u32(present, vceqq_s32(t, key[k]));
    sum[k] += vreinterpretq_f32_u32(vandq_u32(equal, vreinterpretq_u32_f32(w)));
    rest = vbicq_u32(rest, equal);
  }
  const uint32x4_t bit = {1, 2, 4, 8};
  const uint32_t set = vaddvq_u32(vandq_u32(rest, bit));
  const uint8x16_t order = vld1q_u8(kLanes.bytes[set]);
  vst1q_s32(tokens + left, vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(t), order)));
  vstore(weights + left, vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(w), order)));
  return left + kLanes.size[set];
}
MDK_INLINE vi broadcast_token(int32_t token) { return vdupq_n_s32(token); }

#else

constexpr bool kCanTake = false;

#endif

#if defined(MDK_ISA_AVX512) || defined(MDK_ISA_AVX2) || defined(MDK_ISA_NEON)

constexpr int64_t kTakeBlock = 32 * W;  // a lane adds at most 32 weights in fp32, the rest is fp64

// Removes every occurrence of the kTaken distinct `keys` from the n pairs, keeping the order of the
// others, and returns how many are left. sums <- the weights removed. In place: what is written
// never passes what has been read, but a vector beyond the last pair may be overwritten.
template <class Id>
MDK_INLINE int64_t take_tokens(int32_t* tokens, float* weights, int64_t n, const int32_t* keys,
                               double* sums, ValueRequests<Id>* requests) {
  vi key[kTaken];
  for (int k = 0; k < kTaken; ++k) {
    key[k] = broadcast_token(keys[k]);
    sums[k] = 0.0;
  }
  int64_t left = 0;
  for (int64_t begin = 0; begin < n; begin += kTakeBlock) {
    const int64_t end = n - begin < kTakeBlock ? n : begin + kTakeBlock;
    vf sum[kTaken] = {vset(0.0f), vset(0.0f), vset(0.0f), vset(0.0f)};
    int64_t i = begin;
    for (; i + W <= end; i += W) {
      request_values(requests, W < 8 ? 1 : 3 * W / 16);
      left = take_vector(tokens, weights, i, left, first_lanes(W), key, sum);
    }
    if (i < end) left = take_vector(tokens, weights, i, left, first_lanes(end - i), key, sum);
    for (int k = 0; k < kTaken; ++k) {
      float lanes[W];
      double four[4];
      vstore(lanes, sum[k]);
      for (int lane = 0; lane < 4; ++lane) four[lane] = (double)lanes[lane];
      for (int lane = 4; lane < W; ++lane) four[lane % 4] += (double)lanes[lane];
      sums[k] += (four[0] + four[1]) + (four[2] + four[3]);
    }
  }
  return left;
}

#else

template <class Id>
MDK_INLINE int64_t take_tokens(int32_t*, float*, int64_t n, const int32_t*, double*,
                               ValueRequests<Id>*) {
  return n;
}

#endif
