// The operators on the CPU. A lane is one element of the state of one sentence and direction.
// Threads share the lanes out; each walks through time once, so that every tensor is read in long
// contiguous runs.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "isa.h"
#include "library.h"
#include "lrn.h"
#include "lrn_cell.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kBlock = 64;  // lanes that are never split between threads

LRN_HD float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

LRN_HD uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

LRN_HD float widen(float x) { return x; }
LRN_HD double widen(double x) { return x; }
LRN_HD float widen(at::BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.x) << 16); }

LRN_HD float widen(at::Half x) {
  const uint32_t sign = (x.x & 0x8000u) << 16;
  const uint32_t rest = (x.x & 0x7fffu)
                        << 13;  // exponent biased by 15 in the place of one biased by 127
  const uint32_t normal = rest + (112u << 23);
  const uint32_t subnormal =
      float_to_bits(bits_to_float(rest + (113u << 23)) - bits_to_float(113u << 23));
  const uint32_t special = rest | 0x7f800000u;
  const uint32_t magnitude =
      rest < (1u << 23) ? subnormal : (rest >= (31u << 23) ? special : normal);
  return bits_to_float(sign | magnitude);
}

// Half types round to nearest, ties to even.
template <typename T, typename S>
LRN_HD T narrow(S x) {
  if constexpr (std::is_same_v<T, at::BFloat16>) {
    const uint32_t bits = float_to_bits(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return T(static_cast<uint16_t>(x != x ? 0x7fc0u : rounded), T::from_bits());
  } else if constexpr (std::is_same_v<T, at::Half>) {
    const uint32_t bits = float_to_bits(x);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 1/2 leaves multiples of 2^-24, the step of subnormal halves, in the low bits.
    const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t result =
        magnitude < (113u << 23) ? subnormal : (magnitude >= 0x47800000u ? special : normal);
    return T(static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u)), T::from_bits());
  } else {
    return x;
  }
}

template <typename T>
using State = at::opmath_type<T>;

// A (steps, batch, width) tensor whose last axis is contiguous.
template <typename T>
struct Sequence {
  T* data;
  int64_t step_stride, batch_stride;

  explicit Sequence(const Tensor& x)
      : data(x.data_ptr<T>()), step_stride(x.stride(0)), batch_stride(x.stride(1)) {}
  T* row(int64_t step, int64_t sentence) const {
    return data + step * step_stride + sentence * batch_stride;
  }
};

struct Mask {
  const uint8_t* data = nullptr;
  int64_t step_stride = 0, batch_stride = 0;

  explicit Mask(const OptionalTensor& mask) {
    if (mask) {
      data = lrn::bytes(*mask);
      batch_stride = mask->stride(0);
      step_stride = mask->stride(1);
    }
  }
  bool at(int64_t step, int64_t sentence) const {
    return data != nullptr && data[step * step_stride + sentence * batch_stride] != 0;
  }
};

// The lanes of one sentence and direction that a thread owns.
struct Run {
  int64_t sentence, direction, begin, count;
};

struct Layout {
  int64_t steps, batch, directions, parts, size;
  bool reverse;

  Layout(const lrn::Sizes& s, bool reverse)
      : steps(s.steps),
        batch(s.batch),
        directions(s.directions),
        parts(s.parts),
        size(s.width / s.directions),
        reverse(reverse) {}

  int64_t blocks_per_row() const { return (size + kBlock - 1) / kBlock; }
  int64_t blocks() const { return batch * directions * blocks_per_row(); }

  // The run that starts at a block, up to the end of its row or of the thread's blocks; moves block
  // on.
  LRN_HD Run next_run(int64_t& block, int64_t end) const {
    const int64_t row = block / blocks_per_row();
    const int64_t first = block % blocks_per_row();
    const int64_t last = std::min(blocks_per_row(), first + end - block);
    block += last - first;
    const int64_t begin = first * kBlock;
    return {row / directions, row % directions, begin, std::min(size, last * kBlock) - begin};
  }
  int64_t time(int64_t step, int64_t direction) const {
    return reverse || direction == 1 ? steps - 1 - step : step;
  }
};

template <typename T>
struct ForwardArgs {
  Layout layout;
  Sequence<T> projections, output;
  const T* initial_state;
  int64_t initial_stride;
  Mask mask;
  State<T>* state;  // (batch, directions * size)
};

// The pointers of a row function never overlap: only as parameters does the compiler believe
// __restrict.
template <bool kTanh, bool kGate, typename T, typename S>
LRN_HD void forward_row(const T* __restrict q, const T* __restrict k, const T* __restrict v,
                        const T* __restrict o, S* __restrict state, T* __restrict output,
                        int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const S h = lrn::forward<kTanh, kGate, S>(widen(q[j]), widen(k[j]), widen(v[j]),
                                              kGate ? widen(o[j]) : S(0), state[j]);
    state[j] = h;
    output[j] = narrow<T>(h);
  }
}

template <typename T, typename S>
LRN_HD void copy_row(const S* __restrict from, T* __restrict to, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    to[j] = narrow<T>(widen(from[j]));
  }
}

template <typename T, bool kTanh, bool kGate>
LRN_HD void forward_blocks(const ForwardArgs<T>& a, int64_t begin, int64_t end) {
  const int64_t size = a.layout.size, width = size * a.layout.directions;
  for (int64_t block = begin; block < end;) {
    const Run run = a.layout.next_run(block, end);
    const int64_t column = run.direction * size + run.begin;
    copy_row(a.initial_state + run.sentence * a.initial_stride + column,
             a.state + run.sentence * width + column, run.count);
  }
  for (int64_t step = 0; step < a.layout.steps; ++step) {
    for (int64_t block = begin; block < end;) {
      const Run run = a.layout.next_run(block, end);
      const int64_t column = run.direction * size + run.begin;
      const int64_t t = a.layout.time(step, run.direction);
      State<T>* state = a.state + run.sentence * width + column;
      T* output = a.output.row(t, run.sentence) + column;
      if (a.mask.at(t, run.sentence)) {
        copy_row(state, output, run.count);
      } else {
        const T* q =
            a.projections.row(t, run.sentence) + run.direction * a.layout.parts * size + run.begin;
        forward_row<kTanh, kGate>(q, q + size, q + 2 * size, q + 3 * size, state, output,
                                  run.count);
      }
    }
  }
}

template <typename T>
struct BackwardArgs {
  Layout layout;
  Sequence<T> projections, output, grad_output, grad_projections;
  const T* initial_state;
  int64_t initial_stride;
  Mask mask;
  State<T>* grad_state;  // (batch, directions * size), written: the gradient of the initial state
};

template <bool kTanh, bool kGate, typename T, typename S>
LRN_HD void backward_row(const T* __restrict q, const T* __restrict k, const T* __restrict v,
                         const T* __restrict o, const T* __restrict state, const T* __restrict next,
                         const T* __restrict grad_next, S* __restrict carry, T* __restrict grad_q,
                         T* __restrict grad_k, T* __restrict grad_v, T* __restrict grad_o,
                         int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    const lrn::Grad<S> grad = lrn::backward<kTanh, kGate, S>(
        widen(q[j]), widen(k[j]), widen(v[j]), kGate ? widen(o[j]) : S(0), widen(state[j]),
        widen(next[j]), carry[j] + widen(grad_next[j]));
    grad_q[j] = narrow<T>(grad.q);
    grad_k[j] = narrow<T>(grad.k);
    grad_v[j] = narrow<T>(grad.v);
    if constexpr (kGate) {
      grad_o[j] = narrow<T>(grad.o);
    }
    carry[j] = grad.h;
  }
}

template <typename T, typename S>
LRN_HD void add_row(const T* __restrict from, S* __restrict to, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    to[j] += widen(from[j]);
  }
}

template <typename T, bool kTanh, bool kGate>
LRN_HD void backward_blocks(const BackwardArgs<T>& a, int64_t begin, int64_t end) {
  using S = State<T>;
  const int64_t size = a.layout.size, width = size * a.layout.directions, parts = a.layout.parts;
  for (int64_t block = begin; block < end;) {
    const Run run = a.layout.next_run(block, end);
    S* carry = a.grad_state + run.sentence * width + run.direction * size + run.begin;
    std::fill(carry, carry + run.count, S(0));
  }
  for (int64_t step = a.layout.steps - 1; step >= 0; --step) {
    for (int64_t block = begin; block < end;) {
      const Run run = a.layout.next_run(block, end);
      const int64_t column = run.direction * size + run.begin;
      const int64_t part_column = run.direction * parts * size + run.begin;
      const int64_t t = a.layout.time(step, run.direction);
      S* carry = a.grad_state + run.sentence * width + column;
      const T* grad_next = a.grad_output.row(t, run.sentence) + column;
      T* grad_q = a.grad_projections.row(t, run.sentence) + part_column;
      if (a.mask.at(t, run.sentence)) {
        add_row(grad_next, carry, run.count);
        for (int64_t part = 0; part < parts; ++part) {
          std::fill_n(grad_q + part * size, run.count, T(0));
        }
        continue;
      }
      const T* q = a.projections.row(t, run.sentence) + part_column;
      const T* next = a.output.row(t, run.sentence) + column;
      const T* state =
          step == 0 ? a.initial_state + run.sentence * a.initial_stride + column
                    : a.output.row(a.layout.time(step - 1, run.direction), run.sentence) + column;
      backward_row<kTanh, kGate>(q, q + size, q + 2 * size, q + 3 * size, state, next, grad_next,
                                 carry, grad_q, grad_q + size, grad_q + 2 * size, grad_q + 3 * size,
                                 run.count);
    }
  }
}

#define LRN_ENTRIES(suffix, attribute)                                                     \
  template <typename T, bool kTanh, bool kGate>                                            \
  attribute void forward_##suffix(const ForwardArgs<T>& a, int64_t begin, int64_t end) {   \
    forward_blocks<T, kTanh, kGate>(a, begin, end);                                        \
  }                                                                                        \
  template <typename T, bool kTanh, bool kGate>                                            \
  attribute void backward_##suffix(const BackwardArgs<T>& a, int64_t begin, int64_t end) { \
    backward_blocks<T, kTanh, kGate>(a, begin, end);                                       \
  }

LRN_EACH_ISA(LRN_ENTRIES)

template <typename Args>
void run_blocks(void (*blocks)(const Args&, int64_t, int64_t), const Args& args) {
  const int64_t grain =
      std::max<int64_t>(1, 65536 / (kBlock * std::max<int64_t>(1, args.layout.steps)));
  at::parallel_for(0, args.layout.blocks(), grain,
                   [&](int64_t begin, int64_t end) { blocks(args, begin, end); });
}

#define LRN_DISPATCH(pass, sizes, args)                                                  \
  run_blocks(sizes.tanh ? (sizes.parts == 4 ? LRN_PICK(pass, <scalar_t, true, true>)     \
                                            : LRN_PICK(pass, <scalar_t, true, false>))   \
                        : (sizes.parts == 4 ? LRN_PICK(pass, <scalar_t, false, true>)    \
                                            : LRN_PICK(pass, <scalar_t, false, false>)), \
             args)

Tensor state_or_zeros(const OptionalTensor& state, const Tensor& projections, const lrn::Sizes& s) {
  return state ? lrn::rows_contiguous(*state)
               : at::zeros({s.width}, projections.options()).expand({s.batch, s.width});
}

at::TensorOptions state_options(const Tensor& x) {
  return x.options().dtype(at::toOpMathType(x.scalar_type()));
}

Tensor scan_cpu(const Tensor& projections, const OptionalTensor& initial_state,
                const OptionalTensor& padding_mask, const std::string& activation, bool output_gate,
                bool reverse, bool bidirectional) {
  lrn::check_scan(projections, initial_state, padding_mask, activation, output_gate, reverse,
                  bidirectional);
  const lrn::Sizes s = lrn::sizes(projections, activation, output_gate, bidirectional);
  const Tensor input = lrn::rows_contiguous(projections);
  const Tensor initial = state_or_zeros(initial_state, input, s);
  const Tensor state = at::empty({s.batch, s.width}, state_options(input));
  const Tensor output = at::empty({s.steps, s.batch, s.width}, input.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "lrn_scan", [&] {
    const ForwardArgs<scalar_t> args{Layout(s, reverse),
                                     Sequence<scalar_t>(input),
                                     Sequence<scalar_t>(output),
                                     initial.data_ptr<scalar_t>(),
                                     initial.stride(0),
                                     Mask(padding_mask),
                                     state.data_ptr<State<scalar_t>>()};
    LRN_DISPATCH(forward, s, args);
  });
  return output;
}

std::tuple<Tensor, Tensor> scan_backward_cpu(const Tensor& grad_output, const Tensor& projections,
                                             const Tensor& output,
                                             const OptionalTensor& initial_state,
                                             const OptionalTensor& padding_mask,
                                             const std::string& activation, bool output_gate,
                                             bool reverse, bool bidirectional) {
  lrn::check_scan(projections, initial_state, padding_mask, activation, output_gate, reverse,
                  bidirectional);
  lrn::check_states(grad_output, output, projections, output_gate);
  const lrn::Sizes s = lrn::sizes(projections, activation, output_gate, bidirectional);
  const Tensor input = lrn::rows_contiguous(projections);
  const Tensor states = lrn::rows_contiguous(output);
  const Tensor grad = lrn::rows_contiguous(grad_output);
  const Tensor initial = state_or_zeros(initial_state, input, s);
  const Tensor grad_state = at::empty({s.batch, s.width}, state_options(input));
  const Tensor grad_projections = at::empty(input.sizes(), input.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "lrn_scan_backward", [&] {
        const BackwardArgs<scalar_t> args{Layout(s, reverse),
                                          Sequence<scalar_t>(input),
                                          Sequence<scalar_t>(states),
                                          Sequence<scalar_t>(grad),
                                          Sequence<scalar_t>(grad_projections),
                                          initial.data_ptr<scalar_t>(),
                                          initial.stride(0),
                                          Mask(padding_mask),
                                          grad_state.data_ptr<State<scalar_t>>()};
        LRN_DISPATCH(backward, s, args);
      });
  return {grad_projections, grad_state.to(input.scalar_type())};
}

}  // namespace

LRN_LIBRARY_IMPL(CPU, m) {
  m.impl("lrn_scan", scan_cpu);
  m.impl("lrn_scan_backward", scan_backward_cpu);
}
