// Vectors of kLanes floats, in the compiler's own notation, for loops that isa.h compiles once per
// instruction set. With 4 lanes they run everywhere, with 8 they need AVX2, with 16 AVX-512; only
// few operations have no notation and are instructions by name.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "isa.h"
#include "lrn_cell.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector passes between functions: they are inlined

namespace lrn {

constexpr int kLanes_default = 4, kLanes_avx2 = 8, kLanes_avx512 = 16;  // named as isa.h's suffixes

template <int kLanes>
struct Simd {
  typedef float Floats __attribute__((vector_size(kLanes * sizeof(float))));
  typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
  typedef int16_t Shorts __attribute__((vector_size(kLanes * sizeof(int32_t))));  // two in a lane
  typedef uint64_t Longs __attribute__((vector_size(kLanes * sizeof(int32_t))));  // half as many
};
template <int kLanes>
using Floats = typename Simd<kLanes>::Floats;
template <int kLanes>
using Ints = typename Simd<kLanes>::Ints;
template <int kLanes>
using Shorts = typename Simd<kLanes>::Shorts;
template <int kLanes>
using Longs = typename Simd<kLanes>::Longs;

// The same bits as another type.
template <typename To, typename From>
LRN_HD To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits are kept");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <int kLanes>
LRN_HD Floats<kLanes> load(const float* x) {
  Floats<kLanes> v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

template <typename V>
LRN_HD void store(float* x, const V& v) {
  std::memcpy(x, &v, sizeof(v));
}

template <typename V>
LRN_HD V max(const V& a, const V& b) {
  return a > b ? a : b;
}

// Adds the upper half of a vector to the lower one, and so on.
template <int kLanes>
LRN_HD float sum(const Floats<kLanes>& v) {
  if constexpr (kLanes == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    Floats<kLanes / 2> halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return sum<kLanes / 2>(halves[0] + halves[1]);
  }
}

template <int kLanes, typename V>
LRN_HD auto maximum(const V& v) {
  if constexpr (kLanes == 2) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    typedef std::conditional_t<std::is_same_v<V, Floats<kLanes>>, Floats<kLanes / 2>,
                               Ints<kLanes / 2>>
        Half;
    Half halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return maximum<kLanes / 2>(max(halves[0], halves[1]));
  }
}

// Picks lanes, numbered through a and then b.
#if defined(__clang__)
#define LRN_SHUFFLE(kLanes, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LRN_SHUFFLE(kLanes, a, b, ...) __builtin_shuffle(a, b, Ints<kLanes>{__VA_ARGS__})
#endif

template <int kLanes, int... kLane>
LRN_HD void interleave(const Floats<kLanes>& a, const Floats<kLanes>& b, Floats<kLanes>& low,
                       Floats<kLanes>& high, std::integer_sequence<int, kLane...>) {
  low = LRN_SHUFFLE(kLanes, a, b, (kLane / 2 + kLane % 2 * kLanes)...);
  high = LRN_SHUFFLE(kLanes, a, b, (kLanes / 2 + kLane / 2 + kLane % 2 * kLanes)...);
}

// a0 b0 a1 b1 and so on: the first lanes go to low, the others to high.
template <int kLanes>
LRN_HD void interleave(const Floats<kLanes>& a, const Floats<kLanes>& b, Floats<kLanes>& low,
                       Floats<kLanes>& high) {
  interleave<kLanes>(a, b, low, high, std::make_integer_sequence<int, kLanes>{});
}

// Writes the lowest byte of each lane.
template <int kLanes>
LRN_HD void store_bytes(void* to, const Ints<kLanes>& v) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes;
#if defined(__x86_64__)
  if constexpr (kLanes == 16) {
    asm("vpmovdb %1, %0" : "=v"(bytes) : "v"(v));
  } else
#endif
  {
    bytes = __builtin_convertvector(v, Bytes);
  }
  std::memcpy(to, &bytes, sizeof(bytes));
}

// The product of each lane's lower half and b.
template <int kLanes>
LRN_HD Longs<kLanes> multiply_low(const Longs<kLanes>& a, uint32_t b) {
#if defined(__x86_64__)
  Longs<kLanes> product = Longs<kLanes>{} + b;
  if constexpr (kLanes > 4) {
    asm("vpmuludq %1, %0, %0" : "+v"(product) : "v"(a));
  } else {
    asm("pmuludq %1, %0" : "+x"(product) : "x"(a));
  }
  return product;
#else
  return (a & 0xffffffff) * b;
#endif
}

// Writes the lower half of each lane.
template <int kLanes>
LRN_HD void store_low(void* to, const Longs<kLanes>& v) {
  typedef uint32_t Halves __attribute__((vector_size(kLanes / 2 * sizeof(uint32_t))));
  const Halves halves = __builtin_convertvector(v, Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

// Lets no compiler make one operation, which rounds once, of a product and a sum.
template <typename V>
LRN_HD void round_here(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// A bit for each lane of a that is greater than b.
template <int kLanes>
LRN_HD uint32_t greater(const Floats<kLanes>& a, const Floats<kLanes>& b) {
#if defined(__x86_64__)
  uint32_t bits;
  if constexpr (kLanes == 16) {
    asm("vcmpps $30, %2, %1, %%k1\n\tkmovw %%k1, %0" : "=r"(bits) : "v"(a), "v"(b) : "k1");
    return bits;
  } else if constexpr (kLanes == 8) {
    Floats<kLanes> mask;
    asm("vcmpps $30, %2, %1, %0" : "=x"(mask) : "x"(a), "x"(b));
    asm("vmovmskps %1, %0" : "=r"(bits) : "x"(mask));
    return bits;
  }
#endif
  const Ints<kLanes> mask = a > b;
  uint32_t result = 0;
  for (int i = 0; i < kLanes; ++i) {
    result |= (mask[i] & 1u) << i;
  }
  return result;
}

// 2 to the power of t, for t < 127; 0, or next to it, for t below -126.
template <int kLanes>
LRN_HD Floats<kLanes> exp2(const Floats<kLanes>& t) {
  typedef Floats<kLanes> V;
  typedef Ints<kLanes> I;
  V fraction;  // in [0, 1)
  I whole{};
#if defined(__x86_64__)
  if constexpr (kLanes == 16) {
    asm("vreduceps $9, %1, %0" : "=v"(fraction) : "v"(t));
  } else
#endif
  {
    const V clamped = t < -126.0f ? V{} - 126.0f : t;
    const V rounder =
        V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const V shifted = (clamped - 0.5f) + rounder;
    std::memcpy(&whole, &shifted, sizeof(whole));
    fraction = clamped - (shifted - rounder);
  }
  V p = fraction * 1.8775767e-3f + 8.9893397e-3f;
  p = p * fraction + 5.5826318e-2f;
  p = p * fraction + 2.4015361e-1f;
  p = p * fraction + 6.9315308e-1f;
  p = p * fraction + 9.9999994e-1f;
#if defined(__x86_64__)
  if constexpr (kLanes == 16) {
    V result;
    asm("vscalefps %2, %1, %0" : "=v"(result) : "v"(p), "v"(t));
    return result;
  }
#endif
  const I bits = (whole + 127) << 23;
  V scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

}  // namespace lrn
