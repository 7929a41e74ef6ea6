// Dropout on the CPU whose mask is computed again where it is needed, and so never stored.
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "library.h"
#include "simd.h"

namespace {

using at::Tensor;

constexpr int64_t kCounters = 64;          // at a time: several vectors
constexpr int64_t kBlock = 8 * kCounters;  // elements of so many; each has 16 random bits
constexpr int64_t kGrain = 1 << 16;        // elements worth a thread

// Philox4x32-10 (Salmon et al. 2011), which PyTorch uses on CUDA devices, of kCounters counters.
// Each number is the lower half of a 64-bit lane, whose upper half means nothing.
template <int kLanes>
LRN_HD void random_bits(uint64_t seed, uint64_t first, uint16_t* bits) {
  typedef lrn::Longs<kLanes> V;
  constexpr int kCount = kLanes / 2;
  uint64_t counters[kCounters];
  for (int64_t i = 0; i < kCounters; ++i) {
    counters[i] = first + i;
  }
  for (int64_t i = 0; i < kCounters; i += 2 * kCount) {  // two vectors hide each other's latency
    V x[2][4];
    for (int vector = 0; vector < 2; ++vector) {
      std::memcpy(x[vector], counters + i + vector * kCount, sizeof(V));
      x[vector][1] = x[vector][0] >> 32;
      x[vector][2] = x[vector][3] = V{};
    }
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
      for (V* y : {x[0], x[1]}) {
        const V a = lrn::multiply_low<kLanes>(y[0], 0xD2511F53);
        const V b = lrn::multiply_low<kLanes>(y[2], 0xCD9E8D57);
        y[0] = (b >> 32) ^ y[1] ^ key[0];
        y[2] = (a >> 32) ^ y[3] ^ key[1];
        y[1] = b;
        y[3] = a;
      }
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
    for (int number = 0; number < 4; ++number) {
      for (int vector = 0; vector < 2; ++vector) {
        lrn::store_low<kLanes>(bits + 2 * (number * kCounters + i + vector * kCount),
                               x[vector][number]);
      }
    }
  }
}

// Elements whose bits are below `drop` become zero, others are multiplied by `scale`.
template <typename T>
struct Arguments {
  const T* input;
  T* output;
  int64_t size;
  uint64_t seed;
  uint32_t drop;
  float scale;
};

template <int kLanes, typename T>
LRN_HD void drop(const Arguments<T>& a, int64_t begin, int64_t end) {
  uint16_t bits[kBlock];
  float factors[kBlock];
  const int32_t drop = a.drop;
  const float scale = a.scale;
  for (int64_t block = begin; block < end; ++block) {
    random_bits<kLanes>(a.seed, static_cast<uint64_t>(block * kCounters), bits);
    const int64_t first = block * kBlock, count = std::min(kBlock, a.size - first);
    for (int64_t i = 0; i < kBlock; ++i) {
      factors[i] = static_cast<int32_t>(bits[i]) >= drop ? scale : 0.0f;
    }
    for (int64_t i = 0; i < count; ++i) {  // a NaN stays one
      a.output[first + i] = static_cast<T>(static_cast<float>(a.input[first + i]) * factors[i]);
    }
  }
}

#define DROP(suffix, attribute)                                                     \
  template <typename T>                                                             \
  attribute void drop_##suffix(const Arguments<T>& a, int64_t begin, int64_t end) { \
    drop<lrn::kLanes_##suffix>(a, begin, end);                                      \
  }
LRN_EACH_ISA(DROP)

void check(const Tensor& input, double p) {
  TORCH_CHECK(input.scalar_type() == at::kFloat || input.scalar_type() == at::kBFloat16,
              "dropout: input must be float32 or bfloat16, but is ", input.scalar_type());
  TORCH_CHECK(0 <= p && p < 1, "dropout: p must be from 0 to below 1, but is ", p);
}

Tensor dropout_meta(const Tensor& input, double p, int64_t) {
  check(input, p);
  return at::empty_like(input);  // its strides, where it has no gaps
}

Tensor dropout_cpu(const Tensor& input, double p, int64_t seed) {
  const Tensor output = dropout_meta(input, p, seed);
  const Tensor x = input.contiguous();
  const Tensor y = output.is_contiguous() ? output : at::empty_like(x);
  const uint32_t drop = std::min<uint32_t>(65535, std::lround(p * 65536));
  const float scale = 65536.0f / (65536.0f - drop);
  const auto drop_from = [&](auto element) {
    using T = decltype(element);
    const Arguments<T> a{x.const_data_ptr<T>(),
                         y.data_ptr<T>(),
                         x.numel(),
                         static_cast<uint64_t>(seed),
                         drop,
                         scale};
    at::parallel_for(0, (a.size + kBlock - 1) / kBlock, kGrain / kBlock,
                     [&](int64_t begin, int64_t end) { LRN_PICK(drop, <T>)(a, begin, end); });
  };
  x.scalar_type() == at::kFloat ? drop_from(float{}) : drop_from(at::BFloat16{});
  return y.is_same(output) ? output : output.copy_(y);
}

Tensor call(const Tensor& input, double p, int64_t seed) {
  static const auto op = lrn::op<decltype(dropout_cpu)>("fairseq_lrn::dropout");
  return op.call(input, p, seed);
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Dropout : torch::autograd::Function<Dropout> {
  static Tensor forward(AutogradContext* context, const Tensor& input, double p, int64_t seed) {
    context->saved_data["p"] = p;
    context->saved_data["seed"] = seed;
    at::AutoDispatchBelowADInplaceOrView guard;
    return call(input, p, seed);
  }

  // Forward derivatives know PyTorch's operators only.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const double p = context->saved_data["p"].toDouble();
    const int64_t seed = context->saved_data["seed"].toInt();
    const Tensor& grad = grads[0];
    if (!grad._fw_grad(0).defined()) {
      return {call(grad, p, seed), Tensor(), Tensor()};
    }
    Tensor factors;
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      factors = call(at::ones_like(grad), p, seed);
    }
    return {grad.mul(factors), Tensor(), Tensor()};
  }
};

Tensor dropout_autograd(const Tensor& input, double p, int64_t seed) {
  return Dropout::apply(input, p, seed);
}

}  // namespace

LRN_LIBRARY(m) {
  m.def("dropout(Tensor input, float p, int seed) -> Tensor", {at::Tag::pt2_compliant_tag});
}

LRN_LIBRARY_IMPL(CPU, m) { m.impl("dropout", dropout_cpu); }

LRN_LIBRARY_IMPL(Meta, m) { m.impl("dropout", dropout_meta); }

LRN_LIBRARY_IMPL(Autograd, m) { m.impl("dropout", dropout_autograd); }
