// Memory floors: the least a kernel with the same traffic can take, on the same buffers, from the
// same threads. Compiled by floors.py when the benchmark runs, for the machine it runs on.
#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));

inline void fetch(const char* at, size_t ahead) {
  if (ahead != 0) __builtin_prefetch(at + ahead, 0, 2);
}

inline void store(Line* at, Line value, bool stream) {
#if defined(__AVX512F__)
  if (stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(at), reinterpret_cast<__m512i&>(value));
    return;
  }
#elif defined(__AVX__)
  if (stream) {
    const __m256i* half = reinterpret_cast<const __m256i*>(&value);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at), half[0]);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at) + 1, half[1]);
    return;
  }
#endif
  *at = value;
}

// Thread t of n owns whole cache lines [first, last).
inline void share(size_t lines, int t, int n, size_t& first, size_t& last) {
  first = lines * t / n;
  last = lines * (t + 1) / n;
}

uint64_t sum(Line value) {
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += value[i];
  return total;
}

}  // namespace

extern "C" {

// Reads `bytes` (rounded down to cache lines) and writes them back changed. `key` comes from the
// caller so that the compiler cannot drop the store.
void floor_inplace(char* data, size_t bytes, uint64_t key, size_t ahead, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    size_t first, last;
    share(bytes / 64, t, threads, first, last);
    Line* lines = reinterpret_cast<Line*>(data);
    for (size_t i = first; i < last; ++i) {
      fetch(data + i * 64, ahead);
      lines[i] ^= Line{key, key, key, key, key, key, key, key};
    }
  }
}

uint64_t floor_read(const char* data, size_t bytes, size_t ahead, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int t = 0; t < threads; ++t) {
    size_t first, last;
    share(bytes / 64, t, threads, first, last);
    const Line* lines = reinterpret_cast<const Line*>(data);
    Line a{}, b{}, c{}, d{};
    size_t i = first;
    for (; i + 4 <= last; i += 4) {
      for (int k = 0; k < 4; ++k) fetch(data + (i + k) * 64, ahead);
      a += lines[i], b += lines[i + 1], c += lines[i + 2], d += lines[i + 3];
    }
    for (; i < last; ++i) a += lines[i];
    total += sum(a + b + c + d);
  }
  return total;
}

// Two streams in, combined.
uint64_t floor_read2(const char* x, const char* y, size_t bytes, size_t ahead, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int t = 0; t < threads; ++t) {
    size_t first, last;
    share(bytes / 64, t, threads, first, last);
    const Line* p = reinterpret_cast<const Line*>(x);
    const Line* q = reinterpret_cast<const Line*>(y);
    Line a{}, b{};
    for (size_t i = first; i < last; ++i) {
      fetch(x + i * 64, ahead), fetch(y + i * 64, ahead);
      a += p[i], b += q[i];
    }
    total += sum(a + b);
  }
  return total;
}

// Two streams of `bytes` in, `widen` (1 or 2) times as many bytes out: the traffic of mixing two
// fp32 or two bf16 matrices into fp32.
void floor_mix(const char* x, const char* y, char* out, size_t bytes, int widen, size_t ahead,
               bool stream, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    size_t first, last;
    share(bytes / 64, t, threads, first, last);
    const Line* p = reinterpret_cast<const Line*>(x);
    const Line* q = reinterpret_cast<const Line*>(y);
    Line* to = reinterpret_cast<Line*>(out);
    for (size_t i = first; i < last; ++i) {
      fetch(x + i * 64, ahead), fetch(y + i * 64, ahead);
      const Line mixed = p[i] ^ q[i];
      for (int k = 0; k < widen; ++k) store(to + i * widen + k, mixed, stream);
    }
#if defined(__x86_64__)
    if (stream) _mm_sfence();
#endif
  }
}

void floor_copy(const char* from, char* to, size_t bytes, size_t ahead, bool stream, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    size_t first, last;
    share(bytes / 64, t, threads, first, last);
    const Line* in = reinterpret_cast<const Line*>(from);
    Line* out = reinterpret_cast<Line*>(to);
    for (size_t i = first; i < last; ++i) {
      fetch(from + i * 64, ahead);
      store(out + i, in[i], stream);
    }
#if defined(__x86_64__)
    if (stream) _mm_sfence();
#endif
  }
}

// Streams weights[n] and ids[n] and reads table[ids[i]], asked for `ahead` places before: the input
// side of merging neighbours.
uint64_t floor_gather(const float* weights, const int64_t* ids, const int32_t* table, size_t n,
                      size_t ahead, int threads) {
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int t = 0; t < threads; ++t) {
    const size_t first = n * t / threads, last = n * (t + 1) / threads;
    uint32_t bits = 0;
    uint64_t tokens = 0;
    for (size_t i = first; i < last; ++i) {
      if (ahead != 0 && i + ahead < last) __builtin_prefetch(table + ids[i + ahead], 0, 3);
      uint32_t weight;
      __builtin_memcpy(&weight, weights + i, sizeof weight);
      bits ^= weight;
      tokens += table[ids[i]];
    }
    total += tokens + bits;
  }
  return total;
}
}
