// A decoding step of a layer of the model lrn on the CPU, as LRNDecoderLayer.forward defines it, in
// one call. For one sentence, the calls of PyTorch's operators from Python take several times as
// long as their arithmetic.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.h"
#include "lrn.h"
#include "lrn_cell.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kFewRows = 8;      // for more the BLAS is faster
constexpr int64_t kGrain = 1 << 20;  // multiplications worth a thread

// In the order of LRNDecoderLayer.parameters(); each is a weight, and a bias after it.
enum Parameter {
  kRnnNorm = 0,
  kRnn = 2,
  kRnnOut = 4,
  kAttentionNorm = 6,
  kKeys = 8,
  kValues = 10,
  kQuery = 12,
  kAttentionOut = 14,
  kFinalNorm = 16,
  kInner = 18,
  kOuter = 20,
  kParameters = 22,
};

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector passes between functions: they are inlined
constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

LRN_HD Vector load(const float* x) {
  Vector v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

LRN_HD float sum(const Vector& v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &v, sizeof(v));
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof(half));
  const Quarter quarter = quarters[0] + quarters[1];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

struct Linear {
  const float *input, *weight, *bias;
  float* output;
  int64_t rows, in, out;
};

LRN_HD float dot(const float* a, const float* b, int64_t size) {
  Vector sums = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    sums += load(a + i) * load(b + i);
  }
  float total = sum(sums);
  for (; i < size; ++i) {
    total += a[i] * b[i];
  }
  return total;
}

LRN_HD float total(const float* x, int64_t size) {
  Vector sums = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    sums += load(x + i);
  }
  float total = sum(sums);
  for (; i < size; ++i) {
    total += x[i];
  }
  return total;
}

// Each row of weights meets all rows of the input, one vector after another.
template <int kRows>
LRN_HD void linear(const Linear& a, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    const float* weight = a.weight + j * a.in;
    Vector sums[kRows] = {};
    int64_t k = 0;
    for (; k + kLanes <= a.in; k += kLanes) {
      const Vector w = load(weight + k);
      for (int i = 0; i < kRows; ++i) {
        sums[i] += load(a.input + i * a.in + k) * w;
      }
    }
    for (int i = 0; i < kRows; ++i) {
      float total = sum(sums[i]) + a.bias[j];
      for (int64_t rest = k; rest < a.in; ++rest) {
        total += a.input[i * a.in + rest] * weight[rest];
      }
      a.output[i * a.out + j] = total;
    }
  }
}

LRN_HD void linear_of_any(const Linear& a, int64_t begin, int64_t end) {
  switch (a.rows) {
    case 1:
      return linear<1>(a, begin, end);
    case 2:
      return linear<2>(a, begin, end);
    case 3:
      return linear<3>(a, begin, end);
    case 4:
      return linear<4>(a, begin, end);
    case 5:
      return linear<5>(a, begin, end);
    case 6:
      return linear<6>(a, begin, end);
    case 7:
      return linear<7>(a, begin, end);
    default:
      return linear<8>(a, begin, end);
  }
}

struct Norm {
  const float *input, *weight, *bias;
  float* output;
  int64_t size;
};

LRN_HD void norm(const Norm& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float* __restrict x = a.input + i * a.size;
    float* __restrict y = a.output + i * a.size;
    const float mean = total(x, a.size) / a.size;
    for (int64_t j = 0; j < a.size; ++j) {
      y[j] = x[j] - mean;
    }
    const float variance = dot(y, y, a.size) / a.size;
    const float scale = 1 / std::sqrt(variance + 1e-5f);
    for (int64_t j = 0; j < a.size; ++j) {
      y[j] = y[j] * scale * a.weight[j] + a.bias[j];
    }
  }
}

struct Attention {
  const float *query, *keys, *values;  // (N, heads, head), (B, heads, S, head)
  const bool* mask;                    // (B, S) or null
  float *output, *weights;             // as query, and (heads, N, S) or null
  int64_t rows, beams, heads, length, head;
};

LRN_HD void attend(const Attention& a, int64_t begin, int64_t end) {
  std::vector<float> buffer(a.length);
  float* __restrict p = buffer.data();
  const float scale = 1 / std::sqrt(static_cast<float>(a.head));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sentence = row / a.beams;
    const bool* mask = a.mask == nullptr ? nullptr : a.mask + sentence * a.length;
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* query = a.query + (row * a.heads + h) * a.head;
      float* __restrict output = a.output + (row * a.heads + h) * a.head;
      const int64_t offset = (sentence * a.heads + h) * a.length * a.head;
      float maximum = -std::numeric_limits<float>::infinity();
      for (int64_t s = 0; s < a.length; ++s) {
        p[s] = mask != nullptr && mask[s]
                   ? -std::numeric_limits<float>::infinity()
                   : dot(query, a.keys + offset + s * a.head, a.head) * scale;
        maximum = p[s] > maximum ? p[s] : maximum;
      }
      for (int64_t s = 0; s < a.length; ++s) {
        p[s] = lrn::exp_of_negative(p[s] - maximum);
      }
      const float sum = total(p, a.length);
      std::fill_n(output, a.head, 0.0f);
      for (int64_t s = 0; s < a.length; ++s) {
        const float* __restrict value = a.values + offset + s * a.head;
        p[s] = mask != nullptr && mask[s] ? 0 : p[s] / sum;
        for (int64_t j = 0; j < a.head; ++j) {
          output[j] += p[s] * value[j];
        }
      }
      if (a.weights != nullptr) {
        std::copy_n(p, a.length, a.weights + (h * a.rows + row) * a.length);
      }
    }
  }
}

#define ENTRIES(suffix, attribute)                                                                 \
  attribute void linear_##suffix(const Linear& a, int64_t begin, int64_t end) {                    \
    linear_of_any(a, begin, end);                                                                  \
  }                                                                                                \
  attribute void norm_##suffix(const Norm& a, int64_t begin, int64_t end) { norm(a, begin, end); } \
  attribute void attend_##suffix(const Attention& a, int64_t begin, int64_t end) {                 \
    attend(a, begin, end);                                                                         \
  }
LRN_EACH_ISA(ENTRIES)

const float* data(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous(), "lrn_decoder_step: tensors must be contiguous");
  return x.const_data_ptr<float>();  // raises for other types
}

Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const int64_t rows = x.size(1), in = x.size(2), out = bias.numel();
  TORCH_CHECK(weight.sizes() == at::IntArrayRef({out, in}),
              "lrn_decoder_step: parameters do not fit input");
  if (rows > kFewRows) {
    return at::linear(x, weight, bias);
  }
  const Tensor y = at::empty({1, rows, out}, x.options());
  const Linear a{data(x), data(weight), data(bias), y.data_ptr<float>(), rows, in, out};
  at::parallel_for(0, out, 1 + kGrain / (rows * in),
                   [&](int64_t begin, int64_t end) { LRN_PICK(linear, )(a, begin, end); });
  return y;
}

Tensor norm(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  TORCH_CHECK(weight.numel() == x.size(2) && bias.numel() == x.size(2),
              "lrn_decoder_step: parameters do not fit input");
  const Tensor y = at::empty(x.sizes(), x.options());
  const Norm a{data(x), data(weight), data(bias), y.data_ptr<float>(), x.size(2)};
  at::parallel_for(0, x.size(1), 1 + kGrain / 8 / x.size(2),
                   [&](int64_t begin, int64_t end) { LRN_PICK(norm, )(a, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> step(const Tensor& input, const Tensor& state,
                                        const Tensor& keys_values,
                                        const OptionalTensor& encoder_padding_mask,
                                        at::TensorList parameters, const std::string& activation,
                                        bool output_gate, bool need_weights) {
  TORCH_CHECK(parameters.size() == kParameters, "lrn_decoder_step: there must be ", +kParameters,
              " parameters");
  TORCH_CHECK(input.dim() == 3 && input.size(0) == 1 && state.sizes() == input.sizes(),
              "lrn_decoder_step: input and state must be (1, N, C)");
  const int64_t rows = input.size(1), width = input.size(2);
  TORCH_CHECK(keys_values.dim() == 5 && keys_values.size(0) == 2,
              "lrn_decoder_step: keys_values must be (2, B, heads, S, head)");
  const auto size = keys_values.sizes();
  const int64_t sentences = size[1], heads = size[2], length = size[3], head = size[4];
  TORCH_CHECK(heads * head == width && sentences > 0 && rows % sentences == 0,
              "lrn_decoder_step: keys_values do not fit input");
  const auto linear_of = [&](const Tensor& x, Parameter p) {
    return linear(x, parameters[p], parameters[p + 1]);
  };
  const auto norm_of = [&](const Tensor& x, Parameter p) {
    return norm(x, parameters[p], parameters[p + 1]);
  };

  const Tensor h = lrn::scan(linear_of(norm_of(input.contiguous(), kRnnNorm), kRnn), state[0],
                             std::nullopt, activation, output_gate, false, false);
  Tensor x = linear_of(h, kRnnOut).add_(input);

  const Tensor query = linear_of(norm_of(x, kAttentionNorm), kQuery);
  const Tensor found = at::empty(x.sizes(), x.options());
  Tensor weights, mask;
  if (need_weights) {
    weights = at::empty({heads, rows, 1, length}, x.options());
  }
  if (encoder_padding_mask) {
    mask = encoder_padding_mask->contiguous();
    TORCH_CHECK(mask.sizes() == at::IntArrayRef({sentences, length}),
                "lrn_decoder_step: encoder_padding_mask does not fit keys_values");
  }
  const Attention a{data(query),
                    data(keys_values[0]),
                    data(keys_values[1]),
                    mask.defined() ? mask.const_data_ptr<bool>() : nullptr,
                    found.data_ptr<float>(),
                    need_weights ? weights.data_ptr<float>() : nullptr,
                    rows,
                    rows / sentences,
                    heads,
                    length,
                    head};
  at::parallel_for(0, rows, 1 + kGrain / 4 / (width * length),
                   [&](int64_t begin, int64_t end) { LRN_PICK(attend, )(a, begin, end); });
  x = linear_of(found, kAttentionOut).add_(x);

  x = linear_of(linear_of(norm_of(x, kFinalNorm), kInner).relu_(), kOuter).add_(x);
  return {x, h, weights};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fairseq_lrn, m) {
  m.def(
      "lrn_decoder_step(Tensor input, Tensor state, Tensor keys_values, Tensor? "
      "encoder_padding_mask, Tensor[] parameters, *, str activation, bool output_gate, bool "
      "need_weights) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fairseq_lrn, CPU, m) { m.impl("lrn_decoder_step", step); }

TORCH_LIBRARY_IMPL(fairseq_lrn, Autograd, m) {
  m.impl("lrn_decoder_step", torch::autograd::autogradNotImplementedFallback());
}
