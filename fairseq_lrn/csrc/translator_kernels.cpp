#include "translator_kernels.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace lrn {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kLeast = 1e-35f;  // of a row of int8's largest value: 127 divided by it is finite

template <int kLanes>
constexpr int kTileVectors = kLanes == 16 ? 4 : 2;

// How 32 bits of weights in each lane meet 32 bits of a row.
enum class Dot { kFloat32, kBfloat16, kBfloat16Widened, kInt8, kInt8Widened };

constexpr bool is_int8(Dot dot) { return dot == Dot::kInt8 || dot == Dot::kInt8Widened; }

template <Dot kDot, int kLanes>
using Sums = std::conditional_t<is_int8(kDot), Ints<kLanes>, Floats<kLanes>>;

// The products of 16-bit integers, those of a lane added.
template <int kLanes>
LRN_HD Ints<kLanes> dot_shorts(const Shorts<kLanes>& a, const Shorts<kLanes>& b) {
#if defined(__x86_64__)
  Ints<kLanes> result;
  if constexpr (kLanes == 4) {
    Shorts<kLanes> products = a;
    asm("pmaddwd %1, %0" : "+x"(products) : "x"(b));
    result = as<Ints<kLanes>>(products);
  } else {
    asm("vpmaddwd %2, %1, %0" : "=v"(result) : "v"(a), "v"(b));
  }
  return result;
#else
  const auto x = as<Ints<kLanes>>(a), y = as<Ints<kLanes>>(b);
  return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// Adds the products of 32 bits of a row and of weights.
template <Dot kDot, int kLanes>
LRN_HD Sums<kDot, kLanes> dot(const Sums<kDot, kLanes>& old, const Floats<kLanes>& weights,
                              float row) {
  typedef Floats<kLanes> V;
  typedef Shorts<kLanes> S;
  if constexpr (kDot == Dot::kFloat32) {
    return old + weights * row;
  } else {
    Sums<kDot, kLanes> sums = old;
    const auto w = as<Ints<kLanes>>(weights), x = Ints<kLanes>{} + as<int32_t>(row);
    if constexpr (kDot == Dot::kBfloat16Widened) {
      sums += as<V>(w << 16) * as<V>(x << 16);
      sums += as<V>(w & -65536) * as<V>(x & -65536);
    } else if constexpr (kDot == Dot::kInt8Widened) {
      const S even = (as<S>(w) << 8) >> 8, odd = as<S>(w) >> 8;
      const S signed_x = as<S>(x ^ static_cast<int32_t>(0x80808080));
      sums +=
          dot_shorts<kLanes>(even, (signed_x << 8) >> 8) + dot_shorts<kLanes>(odd, signed_x >> 8);
    }
#if defined(__x86_64__)  // GCC keeps the sums of its own functions for these in memory
    if constexpr (kDot == Dot::kBfloat16) {
      asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    } else if constexpr (kDot == Dot::kInt8 && kLanes == 16) {
      asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
    } else if constexpr (kDot == Dot::kInt8) {
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(w));
    }
#endif
    return sums;
  }
}

// kRows rows meet kTileVectors vectors of outputs.
template <Dot kDot, int kLanes, int kRows>
LRN_HD void tile(const PackedLinear& layer, int64_t index, int64_t column, Rows x, Rows y,
                 bool add) {
  constexpr int kVectors = kTileVectors<kLanes>;
  constexpr int kUnits = kRows <= 2 ? 4 : 1;  // of a turn; kPad makes their number a multiple
  typedef Floats<kLanes> V;
  typedef Sums<kDot, kLanes> S;
  constexpr ComputeType kType = is_int8(kDot)           ? ComputeType::kInt8
                                : kDot == Dot::kFloat32 ? ComputeType::kFloat32
                                                        : ComputeType::kBfloat16;
  const int64_t end = units(kType, layer.in);
  const float* weights = layer.data + index * (end + (is_int8(kDot) ? 3 : 1)) * kPanel + column;
  S sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) {
    S start = {};
    if constexpr (kDot != Dot::kInt8Widened) {  // which takes the 128 from the features first
      std::memcpy(&start, weights + c * kLanes, sizeof(start));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r][c] = start;
    }
  }
  weights += kPanel;
  for (int64_t k = 0; k < end; k += kUnits) {
#pragma GCC unroll 8
    for (int i = 0; i < kUnits; ++i, weights += kPanel) {
      V w[kVectors];
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) {
        w[c] = load<kLanes>(weights + c * kLanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float value = x[r][k + i];
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) {
          sums[r][c] = dot<kDot, kLanes>(sums[r][c], w[c], value);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      V result;
      if constexpr (is_int8(kDot)) {
        result = __builtin_convertvector(sums[r][c], V) * x[r][end];
        result *= load<kLanes>(weights + c * kLanes);
        round_here(result);  // so that every instruction set gives the same
        result += load<kLanes>(weights + kPanel + c * kLanes);
      } else {
        result = sums[r][c];
      }
      float* to = y[r] + c * kLanes;
      store(to, add ? result + load<kLanes>(to) : result);
    }
  }
}

// kRows rows meet a panel.
template <Dot kDot, int kLanes, int kRows>
LRN_HD void panel(const PackedLinear& layer, int64_t index, Rows x, Rows y, bool add) {
  constexpr int kColumns = kTileVectors<kLanes> * kLanes;
  for (int64_t column = 0; column < kPanel; column += kColumns) {
    tile<kDot, kLanes, kRows>(layer, index, column, x, {y.data + column, y.stride}, add);
  }
}

template <Dot kDot, int kLanes>
LRN_HD void panel(const PackedLinear& layer, int64_t index, Rows x, int64_t rows, Rows y,
                  bool add) {
  switch (rows) {
    case 1:
      return panel<kDot, kLanes, 1>(layer, index, x, y, add);
    case 2:
      return panel<kDot, kLanes, 2>(layer, index, x, y, add);
    case 3:
      return panel<kDot, kLanes, 3>(layer, index, x, y, add);
    case 4:
      return panel<kDot, kLanes, 4>(layer, index, x, y, add);
    case 5:
      return panel<kDot, kLanes, 5>(layer, index, x, y, add);
    default:
      return panel<kDot, kLanes, kTileRows>(layer, index, x, y, add);
  }
}

template <Dot kDot, int kLanes>
LRN_HD void linear(const PackedLinear& layer, Rows x, int64_t rows, Rows y, bool add) {
  for (int64_t index = 0; index < layer.panels(); ++index) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const Rows output{y[row] + index * kPanel, y.stride};
      panel<kDot, kLanes>(layer, index, x.from(row), std::min(kTileRows, rows - row), output, add);
    }
  }
}

// Calls f with the type's Dot that the instruction set in use has.
template <int kLanes, typename F>
LRN_HD void with_dot(ComputeType type, const F& f) {
  if (type == ComputeType::kFloat32) {
    return f(std::integral_constant<Dot, Dot::kFloat32>());
  }
  const Isa in_use = isa();
  if (type == ComputeType::kBfloat16) {
    if constexpr (kLanes == 16 && LRN_AVX512_BF16) {
      if (in_use == Isa::kAvx512Bf16) {
        return f(std::integral_constant<Dot, Dot::kBfloat16>());
      }
    }
    return f(std::integral_constant<Dot, Dot::kBfloat16Widened>());
  }
  if constexpr (kLanes == 16 || (kLanes == 8 && LRN_AVX2_VNNI)) {
    if (kLanes == 16 ? in_use >= Isa::kAvx512Vnni : in_use == Isa::kAvx2Vnni) {
      return f(std::integral_constant<Dot, Dot::kInt8>());
    }
  }
  return f(std::integral_constant<Dot, Dot::kInt8Widened>());
}

template <int kLanes>
LRN_HD void linear(const PackedLinear& layer, Rows x, int64_t rows, Rows y, bool add) {
  with_dot<kLanes>(layer.type, [&](auto dot) __attribute__((always_inline)) {
    linear<dot(), kLanes>(layer, x, rows, y, add);
  });
}

// Nearest bfloat16, ties to even; a NaN stays one.
template <int kLanes>
LRN_HD void to_bfloat16(const float* x, int64_t size, float* y) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  for (int64_t i = 0; i < size; i += kLanes) {
    const Floats<kLanes> v = load<kLanes>(x + i);
    Ints<kLanes> bits = as<Ints<kLanes>>(v);
    bits = v == v ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
    const Halves halves = __builtin_convertvector(bits >> 16, Halves);
    std::memcpy(y + i / 2, &halves, sizeof(halves));
  }
}

// Nearest multiple of the largest value's 127th part, ties to even. The scale is NaN if a value is.
template <int kLanes>
LRN_HD void to_int8(const float* x, int64_t size, float* y) {
  typedef Ints<kLanes> I;
  I largest = I{} + as<int32_t>(kLeast);  // as integers, since NaN is the largest of all then
  for (int64_t i = 0; i < size; i += kLanes) {
    largest = max(largest, as<I>(load<kLanes>(x + i)) & 0x7fffffff);
  }
  const float most = as<float>(maximum<kLanes>(largest)), inverse = 127 / most;
  for (int64_t i = 0; i < size; i += kLanes) {
    Floats<kLanes> v = load<kLanes>(x + i) * inverse;
    round_here(v);
    v += 12582912.0f + 128;  // 1.5 * 2^23 rounds to an integer in the low bits
    store_bytes<kLanes>(y + i / 4, as<I>(v));
  }
  y[size / 4] = most / 127;
}

template <int kLanes>
LRN_HD void convert_rows(ComputeType type, Rows x, int64_t rows, int64_t size, Rows y) {
  for (int64_t row = 0; row < rows; ++row) {
    switch (type) {
      case ComputeType::kFloat32:
        std::copy_n(x[row], size, y[row]);
        break;
      case ComputeType::kBfloat16:
        to_bfloat16<kLanes>(x[row], size, y[row]);
        break;
      case ComputeType::kInt8:
        to_int8<kLanes>(x[row], size, y[row]);
        break;
    }
  }
}

template <int kLanes>
LRN_HD void normalize(const Norm& norm, Rows x, int64_t rows, Rows y) {
  const int64_t size = norm.size, end = round_up(size, kPad);
  for (int64_t row = 0; row < rows; ++row) {
    const float* input = x[row];
    float* output = y[row];
    Floats<kLanes> total = {};
    for (int64_t i = 0; i < end; i += kLanes) {
      total += load<kLanes>(input + i);
    }
    const float mean = sum<kLanes>(total) / size;
    for (int64_t i = 0; i < end; i += kLanes) {
      store(output + i, load<kLanes>(input + i) - mean);
    }
    std::fill(output + size, output + end, 0.0f);
    Floats<kLanes> squares = {};
    for (int64_t i = 0; i < end; i += kLanes) {
      const Floats<kLanes> v = load<kLanes>(output + i);
      squares += v * v;
    }
    const float scale = 1 / std::sqrt(sum<kLanes>(squares) / size + norm.eps);
    for (int64_t i = 0; i < end; i += kLanes) {
      const Floats<kLanes> v = load<kLanes>(output + i) * scale;
      store(output + i, v * load<kLanes>(norm.weight + i) + load<kLanes>(norm.bias + i));
    }
  }
}

// x times the normal distribution's function; erf by Abramowitz and Stegun, 7.1.26, to 1.5e-7.
LRN_HD float gelu(float x) {
  const float z = std::fabs(x) * 0.70710678f, t = 1 / (1 + 0.3275911f * z);
  float p = 1.061405429f * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float tail = 0.5f * p * t * exp_of_negative(-z * z);  // of the side where x is not
  return x * (x < 0 ? tail : 1 - tail);
}

LRN_HD float gelu_tanh(float x) {
  return 0.5f * x * (1 + lrn::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
}

LRN_HD void activate_rows(Activation activation, Rows x, int64_t rows, int64_t size) {
  for (int64_t row = 0; row < rows; ++row) {
    float* __restrict y = x[row];
    switch (activation) {
      case Activation::kIdentity:
        break;
      case Activation::kRelu:
        for (int64_t i = 0; i < size; ++i) {
          y[i] = y[i] < 0 ? 0 : y[i];
        }
        break;
      case Activation::kGelu:
        for (int64_t i = 0; i < size; ++i) {
          y[i] = gelu(y[i]);
        }
        break;
      case Activation::kGeluTanh:
        for (int64_t i = 0; i < size; ++i) {
          y[i] = gelu_tanh(y[i]);
        }
        break;
      case Activation::kTanh:
        for (int64_t i = 0; i < size; ++i) {
          y[i] = lrn::tanh(y[i]);
        }
        break;
    }
  }
}

template <bool kTanh, bool kGate>
LRN_HD void cell_row(int64_t size, const float* __restrict projections,
                     const float* __restrict state, float* __restrict next) {
  for (int64_t i = 0; i < size; ++i) {
    const float o = kGate ? projections[3 * size + i] : 0;
    next[i] = forward<kTanh, kGate, float>(projections[i], projections[size + i],
                                           projections[2 * size + i], o, state[i]);
  }
}

LRN_HD void cell_row(const Cell& cell, const float* projections, const float* state, float* next) {
  if (cell.output_gate) {
    cell.tanh ? cell_row<true, true>(cell.size, projections, state, next)
              : cell_row<false, true>(cell.size, projections, state, next);
  } else {
    cell.tanh ? cell_row<true, false>(cell.size, projections, state, next)
              : cell_row<false, false>(cell.size, projections, state, next);
  }
}

LRN_HD void cell_rows(const Cell& cell, Rows projections, int64_t rows, const float* const* states,
                      Rows next) {
  for (int64_t row = 0; row < rows; ++row) {
    cell_row(cell, projections[row], states[row], next[row]);
  }
}

LRN_HD void cell_sequence(const Cell& cell, Rows projections, int64_t steps, const float* zeros,
                          Rows output) {
  const int64_t width = cell.parts() * cell.size;
  for (int64_t i = 0; i < steps; ++i) {  // two chains that do not wait for each other
    const int64_t back = steps - 1 - i;
    cell_row(cell, projections[i], i == 0 ? zeros : output[i - 1], output[i]);
    cell_row(cell, projections[back] + width, i == 0 ? zeros : output[back + 1] + cell.size,
             output[back] + cell.size);
  }
}

// Replaces scores by exponentials in proportion to their softmax, zeros behind them; returns the
// sum.
template <int kLanes>
LRN_HD float exponentiate(float* scores, int64_t length) {
  typedef Floats<kLanes> V;
  const int64_t end = round_up(length, kLanes);
  std::fill(scores + length, scores + end, 0.0f);
  V largest = {};
  for (int64_t s = 0; s < end; s += kLanes) {
    const V x = load<kLanes>(scores + s);
    largest = max(largest, max(x, -x));
  }
  float shift = 0;
  if (greater<kLanes>(largest, V{} + 60.0f) != 0) {  // they could overflow, or all vanish
    shift = *std::max_element(scores, scores + length);
  }
  V total = {};
  for (int64_t s = 0; s < end; s += kLanes) {
    float* __restrict p = scores + s;
    for (int i = 0; i < kLanes; ++i) {
      const SplitExp e = split_exp(clamp(p[i] - shift, -87.0f, 60.0f));
      p[i] = s + i < length ? e.scale * e.fraction + e.scale : 0;
    }
    total += load<kLanes>(p);
  }
  return sum<kLanes>(total);
}

// Up to kTileRows queries of one head.
template <int kLanes, int kQueries>
LRN_HD void attend_head(const Attention& a, const KeysValues& sentence, int64_t first, Rows query,
                        Rows output, float* weights) {
  typedef Floats<kLanes> V;
  const int64_t length = sentence.length, stride = round_up(length, kPad),
                width = a.heads * a.head_size;
  const Rows scores{a.buffer, stride};
  const float* keys = sentence.keys + first * stride;
  for (int64_t s = 0; s < stride; s += kLanes) {
    V sums[kQueries] = {};
    for (int64_t i = 0; i < a.head_size; ++i) {
      const V key = load<kLanes>(keys + i * stride + s);
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        sums[q] += key * query[q][first + i];
      }
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      store(scores[q] + s, sums[q]);
    }
  }
  float inverse[kQueries];
  for (int q = 0; q < kQueries; ++q) {
    inverse[q] = 1 / exponentiate<kLanes>(scores[q], length);
    if (weights != nullptr && first < a.weight_heads * a.head_size) {
      const float* __restrict p = scores[q];
      const float share = inverse[q] / a.weight_heads;
      float* __restrict w = weights + q * length;
      for (int64_t s = 0; s < length; ++s) {
        w[s] = (first == 0 ? 0 : w[s]) + p[s] * share;
      }
    }
  }
  for (int64_t i = 0; i < a.head_size; i += kLanes) {
    V sums[kQueries] = {};
    const float* values = sentence.values + first + i;
    for (int64_t s = 0; s < length; ++s) {
      const V value = load<kLanes>(values + s * width);
#pragma GCC unroll 8
      for (int q = 0; q < kQueries; ++q) {
        sums[q] += value * scores[q][s];
      }
    }
#pragma GCC unroll 8
    for (int q = 0; q < kQueries; ++q) {
      store(output[q] + first + i, sums[q] * inverse[q]);
    }
  }
}

template <int kLanes, int kQueries>
LRN_HD void attend_queries(const Attention& a, const KeysValues& sentence, Rows query, Rows output,
                           float* weights) {
  for (int64_t head = 0; head < a.heads; ++head) {
    attend_head<kLanes, kQueries>(a, sentence, head * a.head_size, query, output, weights);
  }
}

template <int kLanes>
LRN_HD void attend_rows(const Attention& a, const KeysValues& sentence, Rows query, int64_t rows,
                        Rows output, float* weights) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const Rows q = query.from(row), y = output.from(row);
    float* w = weights == nullptr ? nullptr : weights + row * sentence.length;
    switch (rows - row) {
      case 1:
        return attend_queries<kLanes, 1>(a, sentence, q, y, w);
      case 2:
        return attend_queries<kLanes, 2>(a, sentence, q, y, w);
      case 3:
        return attend_queries<kLanes, 3>(a, sentence, q, y, w);
      case 4:
        return attend_queries<kLanes, 4>(a, sentence, q, y, w);
      case 5:
        return attend_queries<kLanes, 5>(a, sentence, q, y, w);
      default:
        attend_queries<kLanes, kTileRows>(a, sentence, q, y, w);
    }
  }
}

// What is known of a row's scores after some panels: the sum of exp(score - reference),
// and the best words in descending order. Words at or below the threshold are not among the best.
struct Best {
  float* sums;  // of each lane
  float *reference, *threshold;
  float* values;  // values[-1] is infinity
  float* words;   // int32_t
  int64_t width, capacity;

  LRN_HD Best(float* buffer, int64_t width)
      : sums(buffer),
        reference(buffer + 16),
        threshold(buffer + 17),
        values(buffer + 32),
        words(buffer + 48 + round_up(width, kPad)),
        width(width),
        capacity(round_up(width, kPad)) {}
};

// Puts a word where it belongs; the one at the end falls out. Of equal words the first one leads.
template <int kLanes>
LRN_HD void insert(const Best& best, float value, int32_t word) {
  typedef Floats<kLanes> V;
  float word_bits;
  std::memcpy(&word_bits, &word, sizeof(word));
  for (int64_t i = best.capacity - kLanes; i >= 0; i -= kLanes) {
    const V old = load<kLanes>(best.values + i), before = load<kLanes>(best.values + i - 1);
    const V old_word = load<kLanes>(best.words + i), before_word = load<kLanes>(best.words + i - 1);
    const V v = V{} + value;
    Ints<kLanes> bits = Ints<kLanes>{} + word;
    V w;
    std::memcpy(&w, &bits, sizeof(w));
    store(best.values + i, old >= v ? old : before >= v ? v : before);
    store(best.words + i, old >= v ? old_word : before >= v ? w : before_word);
  }
  *best.threshold = std::max(*best.threshold, best.values[best.width - 1]);
}

// Begins with the first panel: as many words as are wanted are above the threshold.
LRN_HD void start(const Best& best, const float* scores, uint64_t excluded, float highest) {
  std::fill_n(best.sums, 16, 0.0f);
  *best.reference = std::max(highest, -1e30f);
  std::fill_n(best.values - 1, best.capacity + 1, kNone);
  std::fill_n(best.words - 1, best.capacity + 1, 0.0f);
  best.values[-1] = -kNone;
  *best.threshold = kNone;
  if (best.width > kPanel) {
    return;
  }
  float maxima[kPanel];
  std::copy_n(scores, kPanel, maxima);
  for (; excluded != 0; excluded &= excluded - 1) {
    maxima[__builtin_ctzll(excluded)] = kNone;
  }
  int64_t classes = kPanel;
  for (; classes / 2 >= best.capacity; classes /= 2) {
    for (int64_t i = 0; i < classes / 2; ++i) {
      maxima[i] = std::max(maxima[i], maxima[i + classes / 2]);
    }
  }
  float* last = maxima + best.width - 1;
  std::nth_element(maxima, last, maxima + classes, std::greater<float>());
  *best.threshold = std::nextafter(*last, kNone);
}

template <int kLanes>
LRN_HD void update(const Best& best, const float* scores, int64_t first, uint64_t excluded) {
  typedef Floats<kLanes> V;
  constexpr int kVectors = kPanel / kLanes;
  V x[kVectors];
  V top = V{} + kNone;
#pragma GCC unroll 16
  for (int c = 0; c < kVectors; ++c) {
    x[c] = load<kLanes>(scores + c * kLanes);
    top = max(top, x[c]);
  }
  if (first == 0) {
    start(best, scores, excluded, maximum<kLanes>(top));
  }
  const bool found = greater<kLanes>(top, V{} + *best.threshold) != 0;
  if (__builtin_expect(found, 0)) {
    const float highest = maximum<kLanes>(top);
    if (highest > *best.reference + 70) {  // the sum could overflow
      const float scale = std::exp(*best.reference - highest);
      store(best.sums, load<kLanes>(best.sums) * scale);
      *best.reference = highest;
    }
  }
  V sums[2] = {load<kLanes>(best.sums), V{}};
#pragma GCC unroll 16
  for (int c = 0; c < kVectors; ++c) {
    sums[c % 2] += exp2<kLanes>((x[c] - *best.reference) * kLog2E);
  }
  store(best.sums, sums[0] + sums[1]);
  if (__builtin_expect(found, 0)) {
    uint64_t bits = 0;
#pragma GCC unroll 16
    for (int c = 0; c < kVectors; ++c) {
      const uint64_t lanes = greater<kLanes>(x[c], V{} + *best.threshold);
      bits |= lanes << (c * kLanes);
    }
    for (bits &= ~excluded; bits != 0; bits &= bits - 1) {
      const int word = __builtin_ctzll(bits);
      if (scores[word] > *best.threshold) {
        insert<kLanes>(best, scores[word], static_cast<int32_t>(first + word));
      }
    }
  }
}

template <Dot kDot, int kLanes>
LRN_HD void best_words_rows(const PackedLinear& projection, Rows features, int64_t rows,
                            const WordChoice& choice, float* buffer, float* log_probs,
                            int64_t* words) {
  const int64_t width = std::max<int64_t>(choice.width, 1), floats = best_words_floats(width);
  const float scale = 1 / choice.temperature;
  alignas(64) float scores[kTileRows * kPanel];
  for (int64_t index = 0; index < projection.panels(); ++index) {
    const int64_t first = index * kPanel;
    uint64_t excluded = 0;
    for (const int64_t word : choice.excluded) {
      if (word / kPanel == index) {
        excluded |= uint64_t{1} << (word % kPanel);
      }
    }
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int64_t count = std::min(kTileRows, rows - row);
      panel<kDot, kLanes>(projection, index, features.from(row), count, {scores, kPanel}, false);
      if (scale != 1) {
        for (float& x : scores) {
          x *= scale;
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        update<kLanes>(Best(buffer + (row + r) * floats, width), scores + r * kPanel, first,
                       excluded);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const Best best(buffer + row * floats, width);
    const float log_sum = *best.reference + std::log(sum<kLanes>(load<kLanes>(best.sums)));
    const auto write = [&](float score, int64_t word) {
      const float log_prob = score - log_sum;
      *log_probs++ = log_prob == log_prob ? log_prob : kNone;
      *words++ = word;
    };
    for (int64_t i = 0; i < choice.width; ++i) {
      int32_t word;
      std::memcpy(&word, best.words + i, sizeof(word));
      write(best.values[i], word);
    }
    for (int64_t i = 0; i < choice.extras; ++i) {
      const int64_t word = choice.extra[row * choice.extras + i];
      panel<kDot, kLanes, 1>(projection, word / kPanel, features.from(row), {scores, kPanel},
                             false);
      write(scores[word % kPanel] * scale, word);
    }
  }
}

#define ENTRIES(suffix, attribute)                                                                \
  attribute void convert_##suffix(ComputeType type, Rows x, int64_t rows, int64_t size, Rows y) { \
    convert_rows<kLanes_##suffix>(type, x, rows, size, y);                                        \
  }                                                                                               \
  attribute void linear_##suffix(const PackedLinear& layer, Rows x, int64_t rows, Rows y,         \
                                 bool add) {                                                      \
    linear<kLanes_##suffix>(layer, x, rows, y, add);                                              \
  }                                                                                               \
  attribute void normalize_##suffix(const Norm& norm, Rows x, int64_t rows, Rows y) {             \
    normalize<kLanes_##suffix>(norm, x, rows, y);                                                 \
  }                                                                                               \
  attribute void activate_##suffix(Activation activation, Rows x, int64_t rows, int64_t size) {   \
    activate_rows(activation, x, rows, size);                                                     \
  }                                                                                               \
  attribute void cell_step_##suffix(const Cell& cell, Rows projections, int64_t rows,             \
                                    const float* const* states, Rows next) {                      \
    cell_rows(cell, projections, rows, states, next);                                             \
  }                                                                                               \
  attribute void cell_scan_##suffix(const Cell& cell, Rows projections, int64_t steps,            \
                                    const float* zeros, Rows output) {                            \
    cell_sequence(cell, projections, steps, zeros, output);                                       \
  }                                                                                               \
  attribute void attend_##suffix(const Attention& a, const KeysValues& sentence, Rows query,      \
                                 int64_t rows, Rows output, float* weights) {                     \
    attend_rows<kLanes_##suffix>(a, sentence, query, rows, output, weights);                      \
  }                                                                                               \
  attribute void best_words_##suffix(const PackedLinear& projection, Rows features, int64_t rows, \
                                     const WordChoice& choice, float* buffer, float* log_probs,   \
                                     int64_t* words) {                                            \
    with_dot<kLanes_##suffix>(projection.type, [&](auto dot) __attribute__((always_inline)) {     \
      best_words_rows<dot(), kLanes_##suffix>(projection, features, rows, choice, buffer,         \
                                              log_probs, words);                                  \
    });                                                                                           \
  }
LRN_EACH_ISA(ENTRIES)

}  // namespace

void convert(ComputeType type, Rows x, int64_t rows, int64_t size, Rows y) {
  LRN_PICK(convert, )(type, x, rows, size, y);
}

void pack(const PackedLinear& layer, int64_t output, const float* row, float bias) {
  std::vector<float> packed(unit_stride(layer.type, layer.in));
  convert(layer.type, {const_cast<float*>(row), 0}, 1, layer.in, {packed.data(), 0});
  const int64_t count = units(layer.type, layer.in);
  float* to = layer.data + output / kPanel * layer.panel_size() + output % kPanel;
  const auto put = [&to](const auto& value) {
    std::memcpy(to, &value, sizeof(*to));
    to += kPanel;
  };
  if (layer.type == ComputeType::kInt8) {
    int8_t* bytes = reinterpret_cast<int8_t*>(packed.data());
    int32_t sum = 0;
    for (int64_t i = 0; i < layer.in; ++i) {
      bytes[i] ^= -128;
      sum += bytes[i];
    }
    put(-128 * sum);
  } else {
    put(bias);
  }
  for (int64_t k = 0; k < count; ++k) {
    put(packed[k]);
  }
  if (layer.type == ComputeType::kInt8) {
    put(packed[count]);
    put(bias);
  }
}

void linear(const PackedLinear& layer, Rows x, int64_t rows, Rows y, bool add) {
  LRN_PICK(linear, )(layer, x, rows, y, add);
}

void normalize(const Norm& norm, Rows x, int64_t rows, Rows y) {
  LRN_PICK(normalize, )(norm, x, rows, y);
}

void activate(Activation activation, Rows x, int64_t rows, int64_t size) {
  LRN_PICK(activate, )(activation, x, rows, size);
}

void cell_step(const Cell& cell, Rows projections, int64_t rows, const float* const* states,
               Rows next) {
  LRN_PICK(cell_step, )(cell, projections, rows, states, next);
}

void cell_scan(const Cell& cell, Rows projections, int64_t steps, const float* zeros, Rows output) {
  LRN_PICK(cell_scan, )(cell, projections, steps, zeros, output);
}

void store_keys_values(Rows keys_values, int64_t length, int64_t width, float* to) {
  const int64_t stride = round_up(length, kPad);
  float* values = to + width * stride;
  std::fill_n(to, width * stride, 0.0f);
  for (int64_t s = 0; s < length; ++s) {
    const float* row = keys_values[s];
    for (int64_t i = 0; i < width; ++i) {
      to[i * stride + s] = row[i];
    }
    std::copy_n(row + width, width, values + s * width);
  }
}

void attend(const Attention& attention, const KeysValues& sentence, Rows query, int64_t rows,
            Rows output, float* weights) {
  LRN_PICK(attend, )(attention, sentence, query, rows, output, weights);
}

int64_t best_words_floats(int64_t width) {
  return 48 + 2 * round_up(std::max<int64_t>(width, 1), kPad);
}

void best_words(const PackedLinear& projection, Rows features, int64_t rows,
                const WordChoice& choice, float* buffer, float* log_probs, int64_t* words) {
  LRN_PICK(best_words, )(projection, features, rows, choice, buffer, log_probs, words);
}

}  // namespace lrn
