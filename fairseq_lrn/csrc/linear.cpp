// A linear layer that knows two shortcuts. For few rows, with AVX-512, it takes as long as reading
// the weights once, up to half as long as the BLAS. For more, with AVX2 too, on other processors
// than Intel's, it copies the second matrix block by block.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "isa.h"
#include "library.h"
#include "lrn.h"
#include "product.h"

#if defined(LRN_AVX512)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own header
#include <immintrin.h>
#endif

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kFewRows = 8;  // for more the BLAS is as fast, or many_rows
constexpr int64_t kSmallest =
    1 << 18;  // multiplications for which many_rows is worth its preparations
constexpr int64_t kGrain = 1 << 20;  // multiplications worth a thread

#if defined(LRN_AVX512)

#define LRN_INLINE inline __attribute__((always_inline, target(LRN_AVX512)))

struct Arguments {
  const float *input, *weight, *bias;  // bias may be null
  float* output;
  int64_t rows, in, out;
};

// The sums of four vectors.
LRN_INLINE __m128 sum(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
  const __m512 cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
  __m512 abcd = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
  abcd += _mm512_permute_ps(abcd, 0x4e);
  abcd += _mm512_permute_ps(abcd, 0xb1);
  return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, abcd));
}

// Up to four rows of weights, from j on, meet all rows of the input, one vector after another.
template <int kRows>
LRN_INLINE void columns(const Arguments& a, int64_t j, int64_t end) {
  const float* w[4];
  for (int c = 0; c < 4; ++c) {
    w[c] = a.weight + std::min(j + c, end - 1) * a.in;
  }
  __m512 products[kRows][4] = {};
  for (int64_t k = 0; k < a.in; k += 16) {
    const __mmask16 mask = a.in - k >= 16 ? 0xffff : (1u << (a.in - k)) - 1;
    __m512 weight[4];
    for (int c = 0; c < 4; ++c) {
      weight[c] = _mm512_maskz_loadu_ps(mask, w[c] + k);
    }
    for (int i = 0; i < kRows; ++i) {
      const __m512 x = _mm512_maskz_loadu_ps(mask, a.input + i * a.in + k);
      for (int c = 0; c < 4; ++c) {
        products[i][c] = _mm512_fmadd_ps(x, weight[c], products[i][c]);
      }
    }
  }
  const __mmask8 mask = end - j >= 4 ? 0xf : (1u << (end - j)) - 1;
  const __m128 bias = a.bias == nullptr ? __m128{} : _mm_maskz_loadu_ps(mask, a.bias + j);
  for (int i = 0; i < kRows; ++i) {
    const __m512* p = products[i];
    _mm_mask_storeu_ps(a.output + i * a.out + j, mask, sum(p[0], p[1], p[2], p[3]) + bias);
  }
}

template <int kRows>
__attribute__((target(LRN_AVX512))) void linear_rows(const Arguments& a, int64_t begin,
                                                     int64_t end) {
  for (int64_t j = begin; j < end; j += 4) {
    columns<kRows>(a, j, end);
  }
}

using Kernel = void (*)(const Arguments&, int64_t, int64_t);
constexpr Kernel kKernels[kFewRows] = {linear_rows<1>, linear_rows<2>, linear_rows<3>,
                                       linear_rows<4>, linear_rows<5>, linear_rows<6>,
                                       linear_rows<7>, linear_rows<8>};

Tensor few_rows(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                int64_t rows) {
  const Tensor x = input.contiguous(), w = weight.contiguous();
  const OptionalTensor b = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  const Tensor y = at::empty({rows, w.size(0)}, x.options());
  const Arguments a{x.const_data_ptr<float>(),
                    w.const_data_ptr<float>(),
                    b ? b->const_data_ptr<float>() : nullptr,
                    y.data_ptr<float>(),
                    rows,
                    w.size(1),
                    w.size(0)};
  at::parallel_for(0, a.out, 1 + kGrain / (rows * a.in),
                   [&](int64_t begin, int64_t end) { kKernels[rows - 1](a, begin, end); });
  return y;
}

#endif

constexpr int64_t kUnit = 64;  // columns that no two threads share

// A tile is a function by itself, or else the compiler runs out of registers.
#define MULTIPLY(suffix, attribute)                                                \
  __attribute__((noinline)) attribute void tile_##suffix(const lrn::Tile& t) {     \
    lrn::multiply_columns<lrn::kLanes_##suffix>(t);                                \
  }                                                                                \
  attribute void multiply_blocks_##suffix(const lrn::Matrices& m, float* packed) { \
    lrn::multiply_blocks<lrn::kLanes_##suffix>(m, packed, tile_##suffix);          \
  }
LRN_EACH_ISA(MULTIPLY)

// Threads share the longer side of the result.
Tensor many_rows(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const OptionalTensor b = bias ? OptionalTensor(bias->contiguous()) : std::nullopt;
  const Tensor y = at::empty({input.size(0), weight.size(0)}, input.options());
  const lrn::Matrices all{{input.const_data_ptr<float>(), input.stride(0), input.stride(1)},
                          {weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1)},
                          b ? b->const_data_ptr<float>() : nullptr,
                          y.data_ptr<float>(),
                          y.size(1),
                          y.size(0),
                          y.size(1),
                          input.size(1)};
  const bool by_row = all.rows >= all.columns;
  const int64_t unit = by_row ? lrn::kTileRows : kUnit;
  const int64_t size = by_row ? all.rows : all.columns, other = by_row ? all.columns : all.rows;
  const auto multiply = [&](int64_t begin, int64_t end) {
    lrn::Matrices part = all;
    const int64_t first = begin * unit, count = std::min(end * unit, size) - first;
    if (by_row) {
      part.rows = count;
      part.a.data += first * all.a.row;
      part.c += first * all.c_row;
    } else {
      part.columns = count;
      part.b.data += first * all.b.row;
      part.c += first;
      part.bias += all.bias == nullptr ? 0 : first;
    }
    const int64_t columns = std::min(lrn::kColumns, (part.columns + 15) / 16 * 16);
    const auto packed = at::getCPUAllocator()->allocate(columns * std::min(lrn::kDepth, all.depth) *
                                                        static_cast<int64_t>(sizeof(float)));
    LRN_PICK(multiply_blocks, )(part, static_cast<float*>(packed.get()));
  };
  at::parallel_for(0, (size + unit - 1) / unit, 1 + kGrain / (unit * other * all.depth), multiply);
  return y;
}

// MKL, PyTorch's BLAS, is made for Intel's processors; on others it is as fast for few rows.
bool mkl_is_slower(int64_t rows) {
#if defined(LRN_AVX512)
  static const bool intel = __builtin_cpu_is("intel");
  const int64_t most = lrn::isa() >= lrn::Isa::kAvx512 ? kFewRows : 8 * kFewRows;
  return !intel && lrn::isa() >= lrn::Isa::kAvx2 && rows > most;
#else
  return false;
#endif
}

void check(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  TORCH_CHECK(input.dim() >= 2, "linear: input must have 2 axes or more, but has ", input.dim());
  TORCH_CHECK(weight.dim() == 2, "linear: weight must have 2 axes, but has ", weight.dim());
  lrn::check_like("linear: weight", weight, input, input.scalar_type());
  lrn::check_shape("linear: weight", weight, {weight.sym_size(0), input.sym_size(-1)});
  if (bias) {
    lrn::check_like("linear: bias", *bias, input, input.scalar_type());
    lrn::check_shape("linear: bias", *bias, {weight.sym_size(0)});
  }
}

// The sizes of a result.
c10::SymDimVector result_sizes(const Tensor& input, const Tensor& weight) {
  c10::SymDimVector sizes(input.sym_sizes());
  sizes.back() = weight.sym_size(0);
  return sizes;
}

// Its rows as a matrix: with other than two axes there may be as many products as rows.
Tensor flat(const Tensor& x) {
  c10::SymInt rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    rows = rows * x.sym_size(i);
  }
  return x.reshape_symint({rows, x.sym_size(-1)});
}

Tensor product(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const int64_t rows = input.size(0);
  if (input.scalar_type() == at::kFloat && rows > 0 && weight.numel() > 0) {
#if defined(LRN_AVX512)
    if (rows <= kFewRows && lrn::isa() >= lrn::Isa::kAvx512) {
      return few_rows(input, weight, bias, rows);
    }
#endif
    if (weight.size(0) >= 16 && rows * weight.numel() >= kSmallest && mkl_is_slower(rows)) {
      return many_rows(input, weight, bias);
    }
  }
  return at::linear(input, weight, bias);
}

}  // namespace

Tensor lrn::linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  check(input, weight, bias);
  return product(flat(input), weight, bias).view_symint(result_sizes(input, weight));
}

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor linear_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  check(input, weight, bias);
  return input.new_empty_symint(result_sizes(input, weight));
}

Tensor call(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  static const auto op = lrn::op<decltype(lrn::linear)>("fairseq_lrn::linear");
  return op.call(input, weight, bias);
}

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* context, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward(
        {weight.requires_grad() ? input : Tensor(), input.requires_grad() ? weight : Tensor()});
    context->saved_data["bias"] = bias.has_value();
    return call(input, weight, bias);
  }

  // Written in operators that have derivatives, and rules for batches of gradients.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &input = saved[0], &weight = saved[1], grad = flat(grads[0]);
    variable_list result(3);
    if (context->needs_input_grad(0)) {
      c10::SymDimVector sizes(grads[0].sym_sizes());
      sizes.back() = weight.sym_size(1);
      result[0] = call(grad, weight.t(), std::nullopt).reshape_symint(sizes);
    }
    if (context->needs_input_grad(1)) {
      result[1] = call(grad.t(), flat(input).t(), std::nullopt);
    }
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2)) {
      result[2] = grad.sum(0);
    }
    return result;
  }
};

// Forward derivatives and torch.func know PyTorch's operators only.
Tensor composed(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  check(input, weight, bias);
  return at::linear(input, weight, bias);
}

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const bool dual = input._fw_grad(0).defined() || weight._fw_grad(0).defined() ||
                    (bias && bias->_fw_grad(0).defined());
  if (dual ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode)) {
    return composed(input, weight, bias);
  }
  return Linear::apply(input, weight, bias);
}

// For autograd's own batches of gradients.
Tensor linear_batched(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor y = flat(input).mm(weight.t()).reshape_symint(result_sizes(input, weight));
  return bias ? y.add(*bias) : y;
}

}  // namespace

LRN_LIBRARY(m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

LRN_LIBRARY_IMPL(CPU, m) { m.impl("linear", lrn::linear); }

LRN_LIBRARY_IMPL(Meta, m) { m.impl("linear", linear_meta); }

LRN_LIBRARY_IMPL(Autograd, m) { m.impl("linear", linear_autograd); }

LRN_LIBRARY_IMPL(Batched, m) { m.impl("linear", linear_batched); }

LRN_LIBRARY_IMPL(FuncTorchBatched, m) { m.impl("linear", composed); }
