// The blocks of the model lrn on the CPU while it translates, each in one call; they are defined by
// LRNEncoderLayer and LRNDecoderLayer (fairseq_lrn/models/lrn_layers.py). For one sentence, calling
// PyTorch's operators from Python takes several times as long as their arithmetic.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.h"
#include "library.h"
#include "lrn.h"
#include "lrn_cell.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 1 << 20;  // multiplications worth a thread

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector passes between functions: they are inlined
constexpr int64_t kLanes = 8;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

LRN_HD Vector load(const float* x) {
  Vector v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}

LRN_HD float sum(const Vector& v) {
  typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
  Half halves[2];
  std::memcpy(halves, &v, sizeof(v));
  const Half half = halves[0] + halves[1];
  return (half[0] + half[2]) + (half[1] + half[3]);
}

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
  const uint8_t* mask;                 // (B, S) or null
  float *output, *weights;             // as query, and (heads, N, S) or null
  int64_t rows, beams, heads, length, head;
};

LRN_HD void attend(const Attention& a, int64_t begin, int64_t end) {
  std::vector<float> buffer(a.length);
  float* __restrict p = buffer.data();
  const float scale = 1 / std::sqrt(static_cast<float>(a.head));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sentence = row / a.beams;
    const uint8_t* mask = a.mask == nullptr ? nullptr : a.mask + sentence * a.length;
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* query = a.query + (row * a.heads + h) * a.head;
      float* __restrict output = a.output + (row * a.heads + h) * a.head;
      const int64_t offset = (sentence * a.heads + h) * a.length * a.head;
      float maximum = -std::numeric_limits<float>::infinity();
      for (int64_t s = 0; s < a.length; ++s) {
        p[s] = mask != nullptr && mask[s] != 0
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
        p[s] = mask != nullptr && mask[s] != 0 ? 0 : p[s] / sum;
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
  attribute void norm_##suffix(const Norm& a, int64_t begin, int64_t end) { norm(a, begin, end); } \
  attribute void attend_##suffix(const Attention& a, int64_t begin, int64_t end) {                 \
    attend(a, begin, end);                                                                         \
  }
LRN_EACH_ISA(ENTRIES)

const float* data(const Tensor& x) {
  TORCH_CHECK(x.is_contiguous(), "lrn_layers: tensors must be contiguous");
  return x.const_data_ptr<float>();  // raises for other types
}

// What a block does to (T, B, C) with its parameters(), by the place of a weight, which its bias
// follows.
class Layer {
 public:
  explicit Layer(at::TensorList parameters) : parameters_(parameters) {}

  Tensor linear(const Tensor& x, int parameter) const {
    return lrn::linear(x, parameters_[parameter], parameters_[parameter + 1]);
  }

  Tensor norm(const Tensor& x, int parameter) const {
    const Tensor &weight = parameters_[parameter], &bias = parameters_[parameter + 1];
    TORCH_CHECK(x.size(2) > 0, "lrn_layers: input must have a width");
    const Tensor y = at::empty(x.sizes(), x.options());
    const Norm a{data(x), data(weight), data(bias), y.data_ptr<float>(), x.size(2)};
    at::parallel_for(0, x.size(0) * x.size(1), 1 + kGrain / 16 / x.size(2),
                     [&](int64_t begin, int64_t end) { LRN_PICK(norm, )(a, begin, end); });
    return y;
  }

  // x + linear(relu(linear(norm(x))))
  Tensor feed_forward(const Tensor& x, int parameter) const {
    Tensor y = norm(x, parameter);
    y = linear(y, parameter + 2).relu_();
    return linear(y, parameter + 4).add_(x);
  }

 private:
  at::TensorList parameters_;
};

void check_float(const char* what, const Tensor& x, const Tensor& input) {
  lrn::check_like(what, x, input, at::kFloat);
}

void check_parameters(const Tensor& input, at::TensorList parameters, size_t count) {
  check_float("lrn_layers: input", input, input);
  TORCH_CHECK(parameters.size() == count, "lrn_layers: there must be ", count, " parameters");
  for (const Tensor& parameter : parameters) {
    check_float("lrn_layers: parameters", parameter, input);
    TORCH_CHECK(parameter.dim() > 0, "lrn_layers: parameters must have axes");
  }
}

// A weight and the bias that follows it.
void check_linear(at::TensorList parameters, int at, const c10::SymInt& out,
                  const c10::SymInt& in) {
  lrn::check_shape("lrn_layers: weight", parameters[at], {out, in});
  lrn::check_shape("lrn_layers: bias", parameters[at + 1], {out});
}

void check_norm(at::TensorList parameters, int at, const c10::SymInt& width) {
  lrn::check_shape("lrn_layers: LayerNorm's weight", parameters[at], {width});
  lrn::check_shape("lrn_layers: LayerNorm's bias", parameters[at + 1], {width});
}

void check_feed_forward(at::TensorList parameters, int at, const c10::SymInt& width) {
  const c10::SymInt inner = parameters[at + 2].sym_size(0);
  check_norm(parameters, at, width);
  check_linear(parameters, at + 2, inner, width);
  check_linear(parameters, at + 4, width, inner);
}

void check_encoder_layer(const Tensor& input, const OptionalTensor& padding_mask,
                         at::TensorList parameters, bool output_gate) {
  TORCH_CHECK(input.dim() == 3, "lrn_encoder_layer: input must be (T, B, C)");
  check_parameters(input, parameters, 12);
  const c10::SymInt width = input.sym_size(2), projected = parameters[2].sym_size(0);
  const int64_t parts = output_gate ? 4 : 3;
  TORCH_SYM_CHECK((projected % (2 * parts)).sym_eq(0),
                  "lrn_encoder_layer: the recurrence's weight must have rows for two directions");
  check_norm(parameters, 0, width);
  check_linear(parameters, 2, projected, width);
  check_linear(parameters, 4, width, projected / parts);
  check_feed_forward(parameters, 6, width);
  if (padding_mask) {
    lrn::check_like("lrn_encoder_layer: padding_mask", *padding_mask, input, at::kBool);
    lrn::check_shape("lrn_encoder_layer: padding_mask", *padding_mask,
                     {input.sym_size(1), input.sym_size(0)});
  }
}

void check_decoder_step(const Tensor& input, const Tensor& state, const Tensor& keys_values,
                        const OptionalTensor& encoder_padding_mask, at::TensorList parameters,
                        bool output_gate) {
  TORCH_CHECK(input.dim() == 3 && keys_values.dim() == 5,
              "lrn_decoder_step: input must be (1, N, C) and keys_values (2, B, heads, S, head)");
  check_parameters(input, parameters, 22);
  check_float("lrn_decoder_step: state", state, input);
  check_float("lrn_decoder_step: keys_values", keys_values, input);
  const c10::SymInt rows = input.sym_size(1), width = input.sym_size(2),
                    sentences = keys_values.sym_size(1), heads = keys_values.sym_size(2),
                    length = keys_values.sym_size(3);
  lrn::check_shape("lrn_decoder_step: input", input, {1, rows, width});
  lrn::check_shape("lrn_decoder_step: state", state, {1, rows, width});
  TORCH_SYM_CHECK(sentences.sym_gt(0), "lrn_decoder_step: keys_values must have sentences");
  TORCH_SYM_CHECK((rows % sentences).sym_eq(0),
                  "lrn_decoder_step: input must have as many rows for each sentence");
  TORCH_SYM_CHECK(heads.sym_gt(0), "lrn_decoder_step: keys_values must have heads");
  lrn::check_shape("lrn_decoder_step: keys_values", keys_values,
                   {2, sentences, heads, length, width / heads});
  TORCH_SYM_CHECK((width % heads).sym_eq(0), "lrn_decoder_step: heads must divide input's width");
  for (const int at : {0, 6}) {
    check_norm(parameters, at, width);
  }
  check_linear(parameters, 2, width * (output_gate ? 4 : 3), width);
  for (const int at : {4, 12, 14}) {
    check_linear(parameters, at, width, width);
  }
  check_feed_forward(parameters, 16, width);
  if (encoder_padding_mask) {
    lrn::check_like("lrn_decoder_step: encoder_padding_mask", *encoder_padding_mask, input,
                    at::kBool);
    lrn::check_shape("lrn_decoder_step: encoder_padding_mask", *encoder_padding_mask,
                     {sentences, length});
  }
}

Tensor encoder_layer(const Tensor& input, const OptionalTensor& padding_mask,
                     at::TensorList parameters, const std::string& activation, bool output_gate) {
  enum { kRnnNorm = 0, kRnn = 2, kRnnOut = 4, kFeedForward = 6 };
  check_encoder_layer(input, padding_mask, parameters, output_gate);
  const Layer layer(parameters);
  Tensor x = layer.norm(input.contiguous(), kRnnNorm);  // each line frees what the one before used
  x = layer.linear(x, kRnn);
  x = lrn::scan(x, std::nullopt, padding_mask, activation, output_gate, false, true);
  x = layer.linear(x, kRnnOut).add_(input);
  return layer.feed_forward(x, kFeedForward);
}

std::tuple<Tensor, Tensor, Tensor> decoder_step(const Tensor& input, const Tensor& state,
                                                const Tensor& keys_values,
                                                const OptionalTensor& encoder_padding_mask,
                                                at::TensorList parameters,
                                                const std::string& activation, bool output_gate,
                                                bool need_weights) {
  enum {
    kRnnNorm = 0,
    kRnn = 2,
    kRnnOut = 4,
    kAttentionNorm = 6,  // then those of keys and values
    kQuery = 12,
    kAttentionOut = 14,
    kFeedForward = 16
  };
  check_decoder_step(input, state, keys_values, encoder_padding_mask, parameters, output_gate);
  const Layer layer(parameters);
  const int64_t rows = input.size(1), width = input.size(2);
  const auto size = keys_values.sizes();
  const int64_t sentences = size[1], heads = size[2], length = size[3], head = size[4];
  OptionalTensor mask;
  if (encoder_padding_mask) {
    mask = encoder_padding_mask->contiguous();
  }

  const Tensor h = lrn::scan(layer.linear(layer.norm(input.contiguous(), kRnnNorm), kRnn), state[0],
                             std::nullopt, activation, output_gate, false, false);
  const Tensor x = layer.linear(h, kRnnOut).add_(input);

  const Tensor keys = keys_values[0].contiguous(), values = keys_values[1].contiguous();
  const Tensor query = layer.linear(layer.norm(x, kAttentionNorm), kQuery);
  const Tensor found = at::empty(x.sizes(), x.options());
  Tensor weights;
  if (need_weights) {
    weights = at::empty({heads, rows, 1, length}, x.options());
  }
  const Attention a{data(query),
                    data(keys),
                    data(values),
                    mask ? lrn::bytes(*mask) : nullptr,
                    found.data_ptr<float>(),
                    need_weights ? weights.data_ptr<float>() : nullptr,
                    rows,
                    rows / sentences,
                    heads,
                    length,
                    head};
  at::parallel_for(0, rows, 1 + kGrain / 16 / (width * length + 1),
                   [&](int64_t begin, int64_t end) { LRN_PICK(attend, )(a, begin, end); });
  return {layer.feed_forward(layer.linear(found, kAttentionOut).add_(x), kFeedForward), h, weights};
}

Tensor encoder_layer_meta(const Tensor& input, const OptionalTensor& padding_mask,
                          at::TensorList parameters, const std::string&, bool output_gate) {
  check_encoder_layer(input, padding_mask, parameters, output_gate);
  return input.new_empty_symint(input.sym_sizes());
}

std::tuple<Tensor, Tensor, Tensor> decoder_step_meta(const Tensor& input, const Tensor& state,
                                                     const Tensor& keys_values,
                                                     const OptionalTensor& encoder_padding_mask,
                                                     at::TensorList parameters, const std::string&,
                                                     bool output_gate, bool need_weights) {
  check_decoder_step(input, state, keys_values, encoder_padding_mask, parameters, output_gate);
  Tensor weights;
  if (need_weights) {
    weights = input.new_empty_symint(
        {keys_values.sym_size(2), input.sym_size(1), 1, keys_values.sym_size(3)});
  }
  return {input.new_empty_symint(input.sym_sizes()), input.new_empty_symint(input.sym_sizes()),
          weights};
}

}  // namespace

LRN_LIBRARY(m) {
  m.def(
      "lrn_encoder_layer(Tensor input, Tensor? padding_mask, Tensor[] parameters, *, str "
      "activation, bool output_gate) -> Tensor");
  m.def(
      "lrn_decoder_step(Tensor input, Tensor state, Tensor keys_values, Tensor? "
      "encoder_padding_mask, Tensor[] parameters, *, str activation, bool output_gate, bool "
      "need_weights) -> (Tensor, Tensor, Tensor)");
}

LRN_LIBRARY_IMPL(CPU, m) {
  m.impl("lrn_encoder_layer", encoder_layer);
  m.impl("lrn_decoder_step", decoder_step);
}

LRN_LIBRARY_IMPL(Meta, m) {
  m.impl("lrn_encoder_layer", encoder_layer_meta);
  m.impl("lrn_decoder_step", decoder_step_meta);
}

LRN_LIBRARY_IMPL(Autograd, m) {
  m.impl("lrn_encoder_layer", torch::autograd::autogradNotImplementedFallback());
  m.impl("lrn_decoder_step", torch::autograd::autogradNotImplementedFallback());
}
