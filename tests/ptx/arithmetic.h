// Registers, and the instructions of PTX that only compute: see machine.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include "device_host.h"

namespace ptx {

struct half {
  uint16_t bits;
};
struct bfloat {
  uint16_t bits;
};

[[noreturn]] inline void trap(const char* what) {
  std::fprintf(stderr, "PTX: %s in thread %d of block %lld\n", what, mdk::thread_index(),
               static_cast<long long>(mdk::block_index()));
  std::abort();
}

template <class T, class R>
T rd(R reg) {
  static_assert(sizeof(T) <= sizeof(R));
  T value;
  std::memcpy(&value, &reg, sizeof value);
  return value;
}
template <class T, class R>
void wr(R& reg, T value) {
  static_assert(sizeof(T) <= sizeof(R));
  if constexpr (std::is_integral_v<T>)
    reg = static_cast<R>(value);  // the sign fills a wider register
  else if constexpr (sizeof(T) == sizeof(R))
    std::memcpy(&reg, &value, sizeof value);
  else {
    reg = 0;
    std::memcpy(&reg, &value, sizeof value);
  }
}

// ---- arithmetic. Integers wrap.
template <class T, bool = std::is_integral_v<T>>
struct Wrapping {
  using type = std::make_unsigned_t<std::conditional_t<(sizeof(T) < 4), int, T>>;
};
template <class T>
struct Wrapping<T, false> {
  using type = T;
};
template <class T>
using wrapping = typename Wrapping<T>::type;
#define MDK_BINARY(name, sign)                                 \
  template <class T>                                           \
  T name(T a, T b) {                                           \
    return static_cast<T>(wrapping<T>(a) sign wrapping<T>(b)); \
  }
MDK_BINARY(op_add, +)
MDK_BINARY(op_sub, -)
MDK_BINARY(op_mul, *)
MDK_BINARY(op_and, &)
MDK_BINARY(op_or, |)
MDK_BINARY(op_xor, ^)
#undef MDK_BINARY
template <>
inline bool op_and(bool a, bool b) {
  return a && b;
}
template <>
inline bool op_or(bool a, bool b) {
  return a || b;
}
template <>
inline bool op_xor(bool a, bool b) {
  return a != b;
}
template <class T>
T op_not(T a) {
  if constexpr (std::is_same_v<T, bool>)
    return !a;
  else
    return static_cast<T>(~a);
}
template <class T>
T op_mad(T a, T b, T c) {
  return op_add<T>(op_mul<T>(a, b), c);
}
template <class T>
T op_mul_hi(T a, T b) {
  using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Wide>(a) * b) >> (8 * sizeof(T)));
}
template <class T>
T op_div(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    if (b == 0) trap("division by zero");
  return static_cast<T>(a / b);
}
template <class T>
T op_rem(T a, T b) {
  if (b == 0) trap("division by zero");
  return static_cast<T>(a % b);
}
template <class T>
T op_neg(T a) {
  if constexpr (std::is_integral_v<T>)
    return op_sub<T>(0, a);
  else
    return -a;
}
template <class T>
T op_abs(T a) {
  return a < 0 ? op_neg<T>(a) : std::is_integral_v<T> ? a : static_cast<T>(std::fabs(a));
}
template <class T>
T op_min(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return a < b ? a : b;
  else
    return std::fmin(a, b);  // the number of a number and a NaN
}
template <class T>
T op_max(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return a > b ? a : b;
  else
    return std::fmax(a, b);
}
template <class T>
T op_fma(T a, T b, T c) {
  return std::fma(a, b, c);
}
inline float flush(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
template <class T>
T op_fma_ftz(T a, T b, T c) {
  return flush(std::fma(flush(a), flush(b), flush(c)));
}
template <class T>
T op_ex2_ftz(T x) {
  return flush(std::exp2(flush(x)));
}
template <class T>
T op_lg2(T x) {
  return std::log2(x);
}
template <class T>
T op_rcp(T x) {
  return 1 / x;
}
template <class T>
T op_rcp_ftz(T x) {  // of a double, 20 bits of the result are right and the low word is 0
  const double y = 1 / static_cast<double>(x);
  if constexpr (sizeof(T) == 8) return rd<double>(rd<uint64_t>(y) & 0xffffffff00000000ull);
  return flush(static_cast<float>(y));
}
template <class T>
T op_sqrt(T x) {
  return std::sqrt(x);
}

template <class T>
T op_shl(T a, uint32_t by) {
  return by >= 8 * sizeof(T) ? T{0} : static_cast<T>(wrapping<T>(a) << by);
}
template <class T>
T op_shr(T a, uint32_t by) {
  if (by >= 8 * sizeof(T)) return a < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(a >> by);
}
template <class T>
T op_bfe(T a, uint32_t from, uint32_t bits) {
  from &= 255, bits &= 255;
  if (bits == 0) return 0;
  const uint32_t top = from + bits > 8 * sizeof(T) ? 0 : 8 * sizeof(T) - from - bits;
  if (top + from >= 8 * sizeof(T)) return 0;
  return op_shr<T>(op_shl<T>(a, top), top + from);
}
template <class T>
T op_bfi(T a, T into, T from, T bits) {
  from &= 255, bits &= 255;
  const T mask = op_shl<T>(op_sub<T>(op_shl<T>(1, bits), 1), from);
  return (into & ~mask) | (op_shl<T>(a, from) & mask);
}
template <class T>
uint32_t op_popc(T a) {
  return static_cast<uint32_t>(__builtin_popcountll(a));
}
template <class T>
uint32_t op_clz(T a) {
  return a == 0 ? 8 * sizeof(T) : __builtin_clzll(a) - (64 - 8 * sizeof(T));
}
inline uint32_t op_shf_l_wrap(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>(((uint64_t{high} << 32 | low) << (by & 31)) >> 32);
}
inline uint32_t op_shf_r_wrap(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (by & 31));
}
inline uint32_t op_lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t out = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}
template <class T>
T op_prmt(T a, T b, T selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}
template <class T, class H>
T pack(H low, H high) {
  return static_cast<T>(T{high} << (8 * sizeof(H)) | low);
}
template <class T, class H>
T pack(H a, H b, H c, H d) {
  return static_cast<T>(pack<uint32_t>(a, b) | T{pack<uint32_t>(c, d)} << 16);
}

// ---- comparisons: the plain ones are false with a NaN, those in u true
#define MDK_COMPARE(name, test)   \
  template <class T>              \
  bool compare_##name(T a, T b) { \
    return test;                  \
  }
MDK_COMPARE(eq, a == b)
MDK_COMPARE(ne, a<b || a> b)
MDK_COMPARE(lt, a < b)
MDK_COMPARE(le, a <= b)
MDK_COMPARE(gt, a > b)
MDK_COMPARE(ge, a >= b)
MDK_COMPARE(equ, !(a < b || a > b))
MDK_COMPARE(neu, !(a == b))
MDK_COMPARE(ltu, !(a >= b))
MDK_COMPARE(leu, !(a > b))
MDK_COMPARE(gtu, !(a <= b))
MDK_COMPARE(geu, !(a < b))
MDK_COMPARE(num, a == a && b == b)
MDK_COMPARE(nan, a != a || b != b)
#undef MDK_COMPARE

// ---- conversions
template <class T, class S>
T saturate(S x) {
  if (x != x) return 0;
  if (x <= static_cast<S>(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (x >= static_cast<S>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}
template <class T, class S>
T convert_rn(S x) {
  if constexpr (std::is_same_v<S, half>)
    return convert_rn<T>(mdk::half_to_float(x.bits));
  else if constexpr (std::is_same_v<S, bfloat>)
    return convert_rn<T>(mdk::bits_to_float(unsigned{x.bits} << 16));
  else if constexpr (std::is_same_v<T, half>)
    return {static_cast<uint16_t>(mdk::float_to_half(x))};
  else if constexpr (std::is_same_v<T, bfloat>)
    return {static_cast<uint16_t>(mdk::float_to_bfloat(x))};
  else {
    static_assert(std::is_floating_point_v<T> || std::is_integral_v<S>);
    return static_cast<T>(x);
  }
}
#define MDK_ROUND(name, function)              \
  template <class T, class S>                  \
  T convert_##name(S x) {                      \
    if constexpr (std::is_integral_v<T>)       \
      return saturate<T>(std::function(x));    \
    else                                       \
      return static_cast<T>(std::function(x)); \
  }
MDK_ROUND(rzi, trunc)
MDK_ROUND(rni, nearbyint)
MDK_ROUND(rmi, floor)
MDK_ROUND(rpi, ceil)
#undef MDK_ROUND
inline uint32_t convert_f16x2(float low, float high) { return mdk::floats_to_halves(low, high); }
inline uint32_t convert_bf16x2(float low, float high) { return mdk::floats_to_bfloats(low, high); }

}  // namespace ptx
