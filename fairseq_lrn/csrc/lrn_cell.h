// One step of the LRN cell (Zhang and Sennrich 2019, section 3) and its derivative, on scalars.
//
//   i = sigmoid(k + h)   f = sigmoid(q - h)   c = g(i v + f h)   h' = c, or sigmoid(o - c) c with
//   an output gate; g is tanh or the identity.
//
// The CPU loops and the CUDA kernels compile this file; the arithmetic is in float or double
// whatever the tensors hold. The code has no branches, so that a compiler turns a loop over it into
// vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define LRN_HD __device__ __forceinline__
#elif defined(__GNUC__)
#define LRN_HD inline __attribute__((always_inline))
#else
#define LRN_HD inline
#endif

namespace lrn {

// exp(x) = scale * (1 + fraction), with scale a power of two and |fraction| < 0.42. A NaN goes to
// fraction; x must be in [-87, 89], and from 88.4 on scale is infinite.
struct SplitExp {
  float scale, fraction;
};

LRN_HD SplitExp split_exp(float x) {
  const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float shifted = x * 1.44269504f + rounder;
  const float n = shifted - rounder;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 127u) << 23;
  SplitExp result;
  std::memcpy(&result.scale, &bits, sizeof(bits));
  result.fraction = p * (r * r) + r;
  return result;
}

// Both comparisons are false for a NaN, which so passes through.
LRN_HD float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// exp(x) for x <= 0, but at least exp(-87).
LRN_HD float exp_of_negative(float x) {
  const SplitExp e = split_exp(clamp(x, -87.0f, 0.0f));
  return e.scale * e.fraction + e.scale;
}

LRN_HD float sigmoid(float x) {
  const SplitExp e = split_exp(clamp(-x, -87.0f, 89.0f));
  return 1.0f / (1.0f + e.scale * (1.0f + e.fraction));  // as a sum, infinite scales could cancel
}

LRN_HD float tanh(float x) {
  // -expm1(-2x) / (2 + expm1(-2x)); beyond +-10 the result rounds to +-1.
  const SplitExp e = split_exp(clamp(-2.0f * x, -20.0f, 20.0f));
  const float m = e.scale * e.fraction + (e.scale - 1.0f);
  return -m / (2.0f + m);
}

LRN_HD double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }
LRN_HD double tanh(double x) { return std::tanh(x); }

// What the steps below call; CUDA devices have faster ones (lrn_cuda.cuh).
struct PortableGates {
  template <typename S>
  static LRN_HD S sigmoid(S x) {
    return lrn::sigmoid(x);
  }
  template <typename S>
  static LRN_HD S tanh(S x) {
    return lrn::tanh(x);
  }
};

template <bool kTanh, typename Gates, typename S>
LRN_HD S activate(S x) {
  if constexpr (kTanh) {
    return Gates::tanh(x);
  } else {
    return x;
  }
}

// The next state from q, k, v, o (unused without an output gate) and the state h.
template <bool kTanh, bool kGate, typename S, typename Gates = PortableGates>
LRN_HD S forward(S q, S k, S v, S o, S h) {
  const S i = Gates::sigmoid(k + h);
  const S f = Gates::sigmoid(q - h);
  const S c = activate<kTanh, Gates>(i * v + f * h);
  if constexpr (kGate) {
    return Gates::sigmoid(o - c) * c;
  } else {
    return c;
  }
}

template <typename S>
struct Grad {
  S q, k, v, o, h;
};

// The gradients of forward's arguments, given the gradient of the next state and the next state
// itself.
template <bool kTanh, bool kGate, typename S, typename Gates = PortableGates>
LRN_HD Grad<S> backward(S q, S k, S v, S o, S h, S next, S grad) {
  const S i = Gates::sigmoid(k + h);
  const S f = Gates::sigmoid(q - h);
  Grad<S> out;
  S c = next;
  out.o = 0;
  if constexpr (kGate) {
    c = activate<kTanh, Gates>(i * v + f * h);
    const S gate = Gates::sigmoid(o - c);
    out.o = grad * c * gate * (1 - gate);
    grad = grad * gate - out.o;
  }
  if constexpr (kTanh) {
    grad = grad * (1 - c * c);
  }
  out.q = grad * h * f * (1 - f);
  out.k = grad * v * i * (1 - i);
  out.v = grad * i;
  out.h = grad * f + out.k - out.q;
  return out;
}

}  // namespace lrn
