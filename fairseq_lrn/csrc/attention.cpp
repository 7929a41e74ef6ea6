// Multi-head attention of short sequences on the CPU, and its derivative. A sentence's head is
// copied into the processor's cache, as rows of whole vectors, and does not leave it.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "isa.h"
#include "library.h"
#include "lrn.h"
#include "product.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlock = 8 * lrn::kTileRows;  // queries at a time
constexpr int64_t kGrain = 1 << 16;             // multiplications worth a thread
constexpr int64_t kAlign = 16;                  // a row's length is a multiple of it

// T steps, N rows of which each of B sentences has N / B, H heads, S positions, D columns of a
// head.
struct Sizes {
  int64_t steps, sentences, rows, heads, positions, dim;
};

// T is float or bfloat16.
template <typename T>
struct Arguments {
  Sizes size;
  const T *query, *grad_output;  // (T, N, H, D)
  const T *keys, *values;        // (B, H, S, D)
  const uint8_t* padding_mask;   // (B, S), not 0 at padding, or null
  T* output;                     // as query: the context, or the query's gradient
  T *grad_keys, *grad_values;    // as keys
};

// A head's copies, in rows of whole vectors. What is beyond a row's end stays zero.
struct Buffers {
  int64_t width, length;                 // of rows of D columns and of S positions
  float *query, *result, *scores;        // of kBlock queries: (D), (D), (S)
  float *keys, *values, *keys_t, *kept;  // (S, D), (S, D), (D, S), (S): 1 or, at padding, 0
  float *grad, *grad_scores;             // only of the backward pass, likewise
  float *grad_keys, *grad_values, *values_t;
  at::DataPtr memory;

  Buffers(const Sizes& size, bool backward)
      : width((size.dim + kAlign - 1) / kAlign * kAlign),
        length((size.positions + kAlign - 1) / kAlign * kAlign) {
    const int64_t queries = std::min(kBlock, size.steps * (size.rows / size.sentences));
    const int64_t s = length * width, b = backward;
    const std::pair<float**, int64_t> parts[] = {{&query, queries * width},
                                                 {&result, queries * width},
                                                 {&scores, queries * length},
                                                 {&keys, s},
                                                 {&values, s},
                                                 {&keys_t, s},
                                                 {&kept, length},
                                                 {&grad, b * queries * width},
                                                 {&grad_scores, b * queries * length},
                                                 {&grad_keys, b * s},
                                                 {&grad_values, b * s},
                                                 {&values_t, b * s}};
    int64_t total = 0;
    for (const auto& part : parts) {
      total += part.second;
    }
    memory = at::getCPUAllocator()->allocate(total * static_cast<int64_t>(sizeof(float)));
    float* next = static_cast<float*>(memory.get());
    std::fill_n(next, total, 0.0f);
    for (const auto& part : parts) {
      *part.first = std::exchange(next, next + part.second);
    }
  }
};

template <typename To, typename From>
LRN_HD void copy(To* to, const From* from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    to[i] = static_cast<To>(from[i]);
  }
}

// Products to probabilities: scores are products times scale, in base 2. A row with nothing but
// padding gets zeros.
template <int kLanes>
LRN_HD void softmax(float* row, const float* kept, int64_t length, float scale) {
  typedef lrn::Floats<kLanes> V;
  const V lowest = V{} + std::numeric_limits<float>::lowest();
  V maxima = lowest, sums{};
  for (int64_t s = 0; s < length; s += kLanes) {
    const V score = lrn::load<kLanes>(kept + s) != 0 ? lrn::load<kLanes>(row + s) : lowest;
    maxima = lrn::max(score, maxima);
  }
  const float maximum = lrn::maximum<kLanes>(maxima);
  for (int64_t s = 0; s < length; s += kLanes) {
    const V weight = lrn::exp2<kLanes>((lrn::load<kLanes>(row + s) - maximum) * scale);
    const V found = lrn::load<kLanes>(kept + s) != 0 ? weight : V{};
    lrn::store(row + s, found);
    sums += found;
  }
  const float sum = lrn::sum<kLanes>(sums);
  const float share = sum < 0.5f ? 0 : 1 / sum;  // else it is at least 1, or not a number
  for (int64_t s = 0; s < length; s += kLanes) {
    const V found = lrn::load<kLanes>(row + s) * share;
    lrn::store(row + s, found);
  }
}

// The gradient of probabilities to that of scores, times scale.
template <int kLanes>
LRN_HD void softmax_backward(float* grad, const float* row, int64_t length, float scale) {
  typedef lrn::Floats<kLanes> V;
  V sums{};
  for (int64_t s = 0; s < length; s += kLanes) {
    sums += lrn::load<kLanes>(grad + s) * lrn::load<kLanes>(row + s);
  }
  const float sum = lrn::sum<kLanes>(sums);
  for (int64_t s = 0; s < length; s += kLanes) {
    const V found = lrn::load<kLanes>(row + s) * (lrn::load<kLanes>(grad + s) - sum) * scale;
    lrn::store(grad + s, found);
  }
}

template <int kLanes, bool kBackward, typename T>
LRN_HD void attend(const Arguments<T>& a, const Buffers& m, int64_t pair) {
  const int64_t dim = a.size.dim, positions = a.size.positions, width = m.width, length = m.length;
  const int64_t sentence = pair / a.size.heads, head = pair % a.size.heads;
  const int64_t each = a.size.rows / a.size.sentences, queries = a.size.steps * each;
  const float scale = 1 / std::sqrt(static_cast<float>(dim)), log2_e = 1.44269504f;
  for (int64_t s = 0; s < positions; ++s) {
    const int64_t from = (pair * positions + s) * dim;
    copy(m.keys + s * width, a.keys + from, dim);
    copy(m.values + s * width, a.values + from, dim);
    m.kept[s] = a.padding_mask == nullptr || a.padding_mask[sentence * positions + s] == 0;
  }
  lrn::pack<kLanes>({m.keys, width, 1}, length, width, m.keys_t);
  if constexpr (kBackward) {
    lrn::pack<kLanes>({m.values, width, 1}, length, width, m.values_t);
  }
  // A query is a row of the sentence at a step.
  const auto place = [&](int64_t i) {
    return ((i / each * a.size.rows + sentence * each + i % each) * a.size.heads + head) * dim;
  };
  for (int64_t first = 0; first < queries; first += kBlock) {
    const int64_t count = std::min(kBlock, queries - first);
    for (int64_t i = 0; i < count; ++i) {
      copy(m.query + i * width, a.query + place(first + i), dim);
      if constexpr (kBackward) {
        copy(m.grad + i * width, a.grad_output + place(first + i), dim);
      }
    }
    const lrn::Strided scores{m.scores, length, 1}, grads{m.grad_scores, length, 1};
    lrn::multiply<kLanes>({m.query, width, 1}, m.keys_t, length, m.scores, length, count, dim,
                          length);
    for (int64_t i = 0; i < count; ++i) {
      softmax<kLanes>(m.scores + i * length, m.kept, length, scale * log2_e);
    }
    if constexpr (kBackward) {
      const bool add = first > 0;
      lrn::multiply<kLanes>({m.grad, width, 1}, m.values_t, length, m.grad_scores, length, count,
                            dim, length);
      for (int64_t i = 0; i < count; ++i) {
        softmax_backward<kLanes>(m.grad_scores + i * length, m.scores + i * length, length, scale);
      }
      lrn::multiply<kLanes>({m.scores, 1, length}, m.grad, width, m.grad_values, width, positions,
                            count, width, add);
      lrn::multiply<kLanes>({m.grad_scores, 1, length}, m.query, width, m.grad_keys, width,
                            positions, count, width, add);
    }
    lrn::multiply<kLanes>(kBackward ? grads : scores, kBackward ? m.keys : m.values, width,
                          m.result, width, count, positions, width);
    for (int64_t i = 0; i < count; ++i) {
      copy(a.output + place(first + i), m.result + i * width, dim);
    }
  }
  for (int64_t s = 0; kBackward && s < positions; ++s) {
    const int64_t to = (pair * positions + s) * dim;
    copy(a.grad_keys + to, m.grad_keys + s * width, dim);
    copy(a.grad_values + to, m.grad_values + s * width, dim);
  }
}

#define ATTEND(suffix, attribute)                                                              \
  template <bool kBackward, typename T>                                                        \
  attribute void attend_##suffix(const Arguments<T>& a, const Buffers& buffers, int64_t begin, \
                                 int64_t end) {                                                \
    for (int64_t pair = begin; pair < end; ++pair) {                                           \
      attend<lrn::kLanes_##suffix, kBackward>(a, buffers, pair);                               \
    }                                                                                          \
  }
LRN_EACH_ISA(ATTEND)

void check(const Tensor& query, const Tensor& keys_values, const OptionalTensor& padding_mask) {
  TORCH_CHECK(query.scalar_type() == at::kFloat || query.scalar_type() == at::kBFloat16,
              "attention: query must be float32 or bfloat16, but is ", query.scalar_type());
  TORCH_CHECK(query.dim() == 3, "attention: query must have 3 axes, (T, N, C), but has ",
              query.dim());
  lrn::check_like("attention: keys_values", keys_values, query, query.scalar_type());
  TORCH_CHECK(keys_values.dim() == 5,
              "attention: keys_values must have 5 axes, (2, B, heads, S, C / heads), but has ",
              keys_values.dim());
  const auto size = keys_values.sym_sizes();
  TORCH_SYM_CHECK(size[0].sym_eq(2).sym_and(query.sym_size(2).sym_eq(size[2] * size[4])),
                  "attention: keys_values must be (2, B, heads, S, d), with heads x d = ",
                  query.sym_size(2), ", but is ", size);
  TORCH_SYM_CHECK(size[1].sym_ne(0), "attention: keys_values must be of one sentence at least");
  TORCH_SYM_CHECK((query.sym_size(1) % size[1]).sym_eq(0),
                  "attention: query must have the same number of rows for each of ", size[1],
                  " sentences, but has ", query.sym_size(1));
  if (padding_mask) {
    lrn::check_like("attention: padding_mask", *padding_mask, query, at::kBool);
    lrn::check_shape("attention: padding_mask", *padding_mask, {size[1], size[3]});
  }
}

template <bool kBackward>
void run(const Tensor& query, const Tensor& keys_values, const OptionalTensor& padding_mask,
         const Tensor& grad_output, const Tensor& output, const Tensor& grad_keys_values) {
  const Sizes size{query.size(0),       keys_values.size(1), query.size(1),
                   keys_values.size(2), keys_values.size(3), keys_values.size(4)};
  const Tensor mask = padding_mask ? padding_mask->contiguous() : Tensor();
  const Tensor q = query.contiguous(), kv = keys_values.contiguous();
  const Tensor g = kBackward ? grad_output.contiguous() : Tensor();
  const int64_t half = kv.numel() / 2;
  const int64_t pairs = size.sentences * size.heads;
  const int64_t work = q.numel() / std::max<int64_t>(1, pairs) * size.positions;
  const auto attend_as = [&](auto element) {
    using T = decltype(element);
    Arguments<T> a{};
    a.size = size;
    a.query = q.const_data_ptr<T>();
    a.keys = kv.const_data_ptr<T>();
    a.values = a.keys + half;
    a.padding_mask = padding_mask ? lrn::bytes(mask) : nullptr;
    a.output = output.data_ptr<T>();
    if constexpr (kBackward) {
      a.grad_output = g.const_data_ptr<T>();
      a.grad_keys = grad_keys_values.data_ptr<T>();
      a.grad_values = a.grad_keys + half;
    }
    at::parallel_for(0, pairs, 1 + kGrain / (work + 1), [&](int64_t begin, int64_t end) {
      const Buffers buffers(size, kBackward);
      LRN_PICK(attend, <kBackward, T>)(a, buffers, begin, end);
    });
  };
  query.scalar_type() == at::kFloat ? attend_as(float{}) : attend_as(at::BFloat16{});
}

Tensor attention_meta(const Tensor& query, const Tensor& keys_values,
                      const OptionalTensor& padding_mask) {
  check(query, keys_values, padding_mask);
  return at::empty_like(query, at::MemoryFormat::Contiguous);
}

Tensor attention_cpu(const Tensor& query, const Tensor& keys_values,
                     const OptionalTensor& padding_mask) {
  const Tensor output = attention_meta(query, keys_values, padding_mask);
  run<false>(query, keys_values, padding_mask, Tensor(), output, Tensor());
  return output;
}

std::tuple<Tensor, Tensor> attention_backward_meta(const Tensor& grad_output, const Tensor& query,
                                                   const Tensor& keys_values,
                                                   const OptionalTensor& padding_mask) {
  check(query, keys_values, padding_mask);
  lrn::check_like("attention_backward: grad_output", grad_output, query, query.scalar_type());
  lrn::check_shape("attention_backward: grad_output", grad_output, query.sym_sizes());
  return {at::empty_like(query, at::MemoryFormat::Contiguous),
          at::empty_like(keys_values, at::MemoryFormat::Contiguous)};
}

std::tuple<Tensor, Tensor> attention_backward_cpu(const Tensor& grad_output, const Tensor& query,
                                                  const Tensor& keys_values,
                                                  const OptionalTensor& padding_mask) {
  const auto grads = attention_backward_meta(grad_output, query, keys_values, padding_mask);
  run<true>(query, keys_values, padding_mask, grad_output, std::get<0>(grads), std::get<1>(grads));
  return grads;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Attention : torch::autograd::Function<Attention> {
  static Tensor forward(AutogradContext* context, const Tensor& query, const Tensor& keys_values,
                        const OptionalTensor& padding_mask) {
    static const auto attention = lrn::op<decltype(attention_cpu)>("fairseq_lrn::attention");
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({query, keys_values, padding_mask.value_or(Tensor())});
    return attention.call(query, keys_values, padding_mask);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto backward =
        lrn::op<decltype(attention_backward_cpu)>("fairseq_lrn::attention_backward");
    const auto saved = context->get_saved_variables();
    const auto [query, keys_values] = backward.call(
        grads[0], saved[0], saved[1], saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt);
    return {query, keys_values, Tensor()};
  }
};

Tensor attention_autograd(const Tensor& query, const Tensor& keys_values,
                          const OptionalTensor& padding_mask) {
  return Attention::apply(query, keys_values, padding_mask);
}

}  // namespace

LRN_LIBRARY(m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("attention(Tensor query, Tensor keys_values, Tensor? padding_mask=None) -> Tensor", tags);
  m.def(
      "attention_backward(Tensor grad_output, Tensor query, Tensor keys_values, Tensor? "
      "padding_mask) -> (Tensor, Tensor)",
      tags);
}

LRN_LIBRARY_IMPL(CPU, m) {
  m.impl("attention", attention_cpu);
  m.impl("attention_backward", attention_backward_cpu);
}

LRN_LIBRARY_IMPL(Meta, m) {
  m.impl("attention", attention_meta);
  m.impl("attention_backward", attention_backward_meta);
}

LRN_LIBRARY_IMPL(Autograd, m) {
  m.impl("attention", attention_autograd);
  m.impl("attention_backward", torch::autograd::autogradNotImplementedFallback());
}
