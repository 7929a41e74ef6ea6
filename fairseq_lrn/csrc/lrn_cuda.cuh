// The operators' CUDA kernels. A lane is one element of the state of one sentence and direction; a
// thread owns a few neighbouring lanes, keeps their state in registers and walks through time, so
// that every element is read once and written once. No lane needs another one: no synchronisation,
// no atomics, the same result every time.
//
// What hides the memory's latency is a ring in shared memory: a thread copies the elements that it
// will need in the next time steps there, asynchronously, into places of its own. (A ring in
// registers would do if the compiler told its loads apart: it lets those that cross a branch share
// one of the six barriers a warp has, and waits for the newest with the oldest.)
//
// This header knows nothing of PyTorch: nvcc compiles it alone, and so does a host compiler that is
// given stand-ins for CUDA's names (tests/csrc).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "lrn_cell.h"

namespace lrn {
namespace cuda {

// A (steps, batch, ...) tensor whose last axis is contiguous; strides count elements.
template <typename T>
struct Sequence {
  T* data;
  int64_t step_stride, batch_stride;

  // Whether every row starts where a vector of this many elements may.
  bool aligned(int64_t width) const {
    return reinterpret_cast<uintptr_t>(data) % (width * sizeof(T)) == 0 &&
           step_stride % width == 0 && batch_stride % width == 0;
  }
};

struct Problem {
  int64_t steps, batch, directions, size;  // size: elements of one direction's state
  bool reverse, tanh, gate;
};

// Sequences without steps, as the initial state, have a step stride of 0; those that are not given
// have no data.
template <typename T>
struct ForwardArgs {
  Problem problem;
  Sequence<const T> projections, initial_state;
  Sequence<const uint8_t> mask;  // any byte that is not 0 is True
  Sequence<T> output;

  bool aligned(int64_t width) const {
    return projections.aligned(width) && initial_state.aligned(width) && output.aligned(width);
  }
};

template <typename T>
struct BackwardArgs {
  Problem problem;
  Sequence<const T> projections, initial_state;
  Sequence<const uint8_t> mask;  // any byte that is not 0 is True
  Sequence<const T> output, grad_output;
  Sequence<T> grad_projections, grad_initial_state;

  bool aligned(int64_t width) const {
    return projections.aligned(width) && initial_state.aligned(width) && output.aligned(width) &&
           grad_output.aligned(width) && grad_projections.aligned(width) &&
           grad_initial_state.aligned(width);
  }
};

// The hardware's own instructions. Largest relative errors by the PTX manual, within which gates
// were on a card, too (tests/csrc): ex2 2^-22, rcp 2^-23, tanh 2^-11; ex2 and rcp flush subnormal
// numbers to zero; tanh is there from Turing (7.5) on.
#if defined(__CUDACC__)
LRN_HD float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

LRN_HD float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

LRN_HD float tanh_approx(float x) {
#if __CUDA_ARCH__ >= 750
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f - 2.0f * rcp_approx(1.0f + ex2_approx(2.88539008f * x));
#endif
}

// Copies kBytes (4, 8 or 16) to shared memory, some time before the thread waits for it.
template <int kBytes>
LRN_HD void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(address), "l"(from)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(kBytes)
                 : "memory");
  }
#else
  struct alignas(kBytes) Chunk {
    uint32_t words[kBytes / 4];
  };
  *static_cast<Chunk*>(to) = *static_cast<const Chunk*>(from);
#endif
}

// Makes a group of the copies since the last one.
LRN_HD void commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all groups but the newest ones.
template <int kNewest>
LRN_HD void wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
#endif
}
#endif

// The gates by storage type. Infinities and NaN come out as from exact arithmetic.
template <typename T>
struct Gates : PortableGates {};

template <>
struct Gates<float> {
  static LRN_HD float sigmoid(float x) { return rcp_approx(1.0f + ex2_approx(-1.44269504f * x)); }
  static LRN_HD float tanh(float x) {
    // The quotient cancels near 0, where the power series is used instead.
    const float far = 1.0f - 2.0f * rcp_approx(1.0f + ex2_approx(2.88539008f * x));
    const float s = x * x;
    float p = 2.18694885e-2f;
    p = p * s - 5.39682540e-2f;
    p = p * s + 1.33333333e-1f;
    p = p * s - 3.33333333e-1f;
    return s < 0.0625f ? x * s * p + x : far;
  }
};

// tanh.approx could double float16's rounding errors.
template <>
struct Gates<__half> : Gates<float> {};

// One instruction a gate.
template <>
struct Gates<__nv_bfloat16> {
  static LRN_HD float sigmoid(float x) { return 0.5f * tanh_approx(0.5f * x) + 0.5f; }
  static LRN_HD float tanh(float x) { return tanh_approx(x); }
};

template <typename T>
using State = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The lower or the higher 16 bits of a word.
LRN_HD float widen(__half, uint32_t word, bool high) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(high ? word >> 16 : word)));
}
LRN_HD float widen(__nv_bfloat16, uint32_t word, bool high) {
  const uint32_t bits = high ? word & 0xffff0000u : word << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
LRN_HD uint16_t narrow(__half, float x) { return __half_as_ushort(__float2half_rn(x)); }
LRN_HD uint16_t narrow(__nv_bfloat16, float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// What one memory access moves: lanes packed in registers of 32 bits (or one lane of fewer).
template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  using Word =
      std::conditional_t<(sizeof(T) > 2), T, std::conditional_t<(kWidth > 1), uint32_t, uint16_t>>;
  static constexpr int kLanes = sizeof(Word) / sizeof(T);  // in a word
  Word words[kWidth / kLanes];

  LRN_HD void unpack(State<T>* lanes) const {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if constexpr (sizeof(T) > 2) {
        lanes[i] = words[i];
      } else {
        lanes[i] = widen(T(), words[i / kLanes], i % kLanes == 1);
      }
    }
  }

  static LRN_HD Vector pack(const State<T>* lanes) {
    Vector vector;
#pragma unroll
    for (int i = 0; i < kWidth; i += kLanes) {
      if constexpr (sizeof(T) > 2) {
        vector.words[i] = lanes[i];
      } else if constexpr (kLanes == 1) {
        vector.words[i] = narrow(T(), lanes[i]);
      } else {
        vector.words[i / kLanes] =
            narrow(T(), lanes[i]) | static_cast<uint32_t>(narrow(T(), lanes[i + 1])) << 16;
      }
    }
    return vector;
  }
};

template <int kWidth, typename T>
LRN_HD Vector<std::remove_const_t<T>, kWidth> load(const T* from) {
  return *reinterpret_cast<const Vector<std::remove_const_t<T>, kWidth>*>(from);
}

template <int kWidth, typename T>
LRN_HD void store(T* to, const State<T>* lanes) {
  *reinterpret_cast<Vector<T, kWidth>*>(to) = Vector<T, kWidth>::pack(lanes);
}

constexpr int kBlock = 64;  // threads of a block at most: few, so that few lanes spread evenly

// Bytes of shared memory that hold one X; copies move no fewer than 4.
template <typename X>
constexpr int kPlace = std::max<int>(4, sizeof(X));

// Time steps that are awaited together.
constexpr int kGroup = 4;

// Time steps a ring holds: what keeps the memory busy. More bytes would only queue.
template <typename X>
constexpr int kSteps = sizeof(X) < 16 ? 16 : 8;

// The lanes of one thread.
struct Lanes {
  int64_t sentence, direction, lane;
  bool exist, backwards;  // backwards: time runs from the last step to the first

  LRN_HD Lanes(const Problem& p, int width) {
    const int64_t vectors = p.size / width;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t row = index / vectors;
    sentence = row / p.directions;
    direction = row % p.directions;
    lane = index % vectors * width;
    exist = sentence < p.batch;
    backwards = p.reverse || direction == 1;
  }
};

// A pointer that walks through a sequence's steps.
template <typename T>
struct Walk {
  T* at;
  int64_t stride;

  LRN_HD Walk(const Sequence<T>& x, const Problem& p, int64_t sentence, int64_t column,
              bool backwards)
      : at(x.data + sentence * x.batch_stride + column +
           (backwards ? (p.steps - 1) * x.step_stride : 0)),
        stride(backwards ? -x.step_stride : x.step_stride) {}
  LRN_HD void move() { at += stride; }
};

// One X from every step of a sequence, through the thread's places in a ring. An X of less than 4
// bytes comes with its neighbours in the 4 bytes around it.
template <typename X, typename T>
struct Stream {
  static constexpr int kSlot = kBlock * kPlace<X>;  // bytes from one step's place to the next one's
  Walk<const T> walk;
  char* ring;
  uint32_t offset, stride;  // where the X to be read next lies in its 4 bytes

  LRN_HD Stream(const Walk<const T>& walk, char* ring)
      : walk(walk),
        ring(ring + threadIdx.x * kPlace<X>),
        offset(static_cast<uint32_t>(reinterpret_cast<uintptr_t>(walk.at))),
        stride(static_cast<uint32_t>(walk.stride * sizeof(T))) {}

  LRN_HD void fetch(int slot) {
    const void* from = walk.at;
    if constexpr (sizeof(X) < 4) {
      from = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) & ~uintptr_t(3));
    }
    copy_async<kPlace<X>>(ring + slot * kSlot, from);
    walk.move();
  }
  LRN_HD X read(int slot) {
    const char* place = ring + slot * kSlot;
    if constexpr (sizeof(X) < 4) {
      place += offset & 3;
      offset += stride;
    }
    return *reinterpret_cast<const X*>(place);
  }
};

// Which of a group's steps are padding, asked for a group ahead: neighbours read the same few
// bytes.
struct Padding {
  Walk<const uint8_t> walk;
  const bool given;
  bool next[kGroup] = {};

  LRN_HD Padding(const Sequence<const uint8_t>& mask, const Problem& p, int64_t sentence,
                 bool backwards)
      : walk(mask, p, sentence, 0, backwards), given(mask.data != nullptr) {}
  LRN_HD void fetch(int64_t left) {
    if (given) {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (j < left) {
          next[j] = *walk.at != 0;
          walk.move();
        }
      }
    }
  }
  LRN_HD uint32_t read() const {  // bit j: of the group's step j
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      bits |= static_cast<uint32_t>(next[j]) << j;
    }
    return bits;
  }
};

// All time steps, through rings of kSlots: fetch(slot, last) asks for the elements of one step and
// read(slot, last) gets them, last telling of the last step; compute(elements, padded) does the
// rest.
template <int kSlots, typename Fetch, typename Read, typename Compute>
LRN_HD void run(int64_t steps, Padding& padding, const Fetch& fetch, const Read& read,
                const Compute& compute) {
#pragma unroll 1
  for (int slot = 0; slot < kSlots; ++slot) {
    if (slot < steps) {
      fetch(slot, slot + 1 == steps);
    }
    if (slot % kGroup == kGroup - 1) {
      commit();
    }
  }
  padding.fetch(steps);
  int slot = 0;
  int64_t rest = steps;
#pragma unroll 1
  for (; rest > kGroup; rest -= kGroup, slot = (slot + kGroup) % kSlots) {
    const uint32_t padded = padding.read();
    padding.fetch(rest - kGroup);
    wait<kSlots / kGroup - 1>();
    decltype(read(0, false)) elements[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      elements[j] = read(slot + j, false);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      compute(elements[j], padded >> j & 1);
      if (rest > kSlots + j) {
        fetch(slot + j, rest == kSlots + j + 1);
      }
    }
    commit();
  }
  wait<0>();
  uint32_t padded = padding.read();
#pragma unroll 1
  for (; rest > 0; --rest, ++slot, padded >>= 1) {
    compute(read(slot, rest == 1), padded & 1);
  }
}

template <typename T, int kWidth, bool kTanh, bool kGate>
__global__ void __launch_bounds__(kBlock) forward_kernel(const ForwardArgs<T> a) {
  using S = State<T>;
  using X = Vector<T, kWidth>;
  constexpr int kParts = kGate ? 4 : 3;
  constexpr int kRing = kSteps<X> * kBlock * kPlace<X>;
  alignas(16) __shared__ char memory[kParts * kRing];
  const Problem& p = a.problem;
  const Lanes lanes(p, kWidth);
  if (!lanes.exist || p.steps == 0) {
    return;
  }
  const int64_t column = lanes.direction * p.size + lanes.lane;
  const auto part = [&](int number) {
    return Stream<X, T>(
        Walk<const T>(a.projections, p, lanes.sentence,
                      (lanes.direction * kParts + number) * p.size + lanes.lane, lanes.backwards),
        memory + number * kRing);
  };
  Stream<X, T> q = part(0), k = part(1), v = part(2), o = part(kParts - 1);
  Padding padding(a.mask, p, lanes.sentence, lanes.backwards);
  Walk<T> output(a.output, p, lanes.sentence, column, lanes.backwards);

  S h[kWidth] = {};
  struct Step {
    X q, k, v, o;
  };
  const auto fetch = [&](int slot, bool) {
    q.fetch(slot);
    k.fetch(slot);
    v.fetch(slot);
    if constexpr (kGate) {
      o.fetch(slot);
    }
  };
  const auto read = [&](int slot, bool) {
    Step step;
    step.q = q.read(slot);
    step.k = k.read(slot);
    step.v = v.read(slot);
    if constexpr (kGate) {
      step.o = o.read(slot);
    }
    return step;
  };
  const auto compute = [&](const Step& step, bool padded) {
    S x[4][kWidth] = {};
    step.q.unpack(x[0]);
    step.k.unpack(x[1]);
    step.v.unpack(x[2]);
    if constexpr (kGate) {
      step.o.unpack(x[3]);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const S next =
          lrn::forward<kTanh, kGate, S, Gates<T>>(x[0][i], x[1][i], x[2][i], x[3][i], h[i]);
      h[i] = padded ? h[i] : next;
    }
    store<kWidth>(output.at, h);
    output.move();
  };

  if (a.initial_state.data != nullptr) {
    load<kWidth>(a.initial_state.data + lanes.sentence * a.initial_state.batch_stride + column)
        .unpack(h);
  }
  run<kSteps<X>>(p.steps, padding, fetch, read, compute);
}

template <typename T, int kWidth, bool kTanh, bool kGate>
__global__ void __launch_bounds__(kBlock) backward_kernel(const BackwardArgs<T> a) {
  using S = State<T>;
  using X = Vector<T, kWidth>;
  constexpr int kParts = kGate ? 4 : 3;
  constexpr int kRing = kSteps<X> * kBlock * kPlace<X>;
  constexpr bool kNext = kTanh && !kGate;  // the derivative needs the next state
  alignas(16) __shared__ char memory[(kParts + 2) * kRing];
  const Problem& p = a.problem;
  const Lanes lanes(p, kWidth);
  if (!lanes.exist) {
    return;
  }
  const bool backwards = !lanes.backwards;  // gradients run against time
  const int64_t column = lanes.direction * p.size + lanes.lane;
  const int64_t part_column = lanes.direction * kParts * p.size + lanes.lane;
  const auto part = [&](int number) {
    return Stream<X, T>(
        Walk<const T>(a.projections, p, lanes.sentence, part_column + number * p.size, backwards),
        memory + number * kRing);
  };
  Stream<X, T> q = part(0), k = part(1), v = part(2), o = part(kParts - 1);
  Stream<X, T> grad(Walk<const T>(a.grad_output, p, lanes.sentence, column, backwards),
                    memory + kParts * kRing);
  Walk<const T> states(a.output, p, lanes.sentence, column, backwards);
  S next[kWidth] = {};
  if (kNext && p.steps > 0) {
    load<kWidth>(states.at).unpack(next);
  }
  states.move();
  Stream<X, T> state(states, memory + (kParts + 1) * kRing);
  Padding padding(a.mask, p, lanes.sentence, backwards);
  Walk<T> output(a.grad_projections, p, lanes.sentence, part_column, backwards);

  X initial = {};
  if (a.initial_state.data != nullptr) {
    initial =
        load<kWidth>(a.initial_state.data + lanes.sentence * a.initial_state.batch_stride + column);
  }
  S carry[kWidth] = {};
  struct Step {
    X q, k, v, o, grad, state;
  };
  const auto fetch = [&](int slot, bool first) {
    q.fetch(slot);
    k.fetch(slot);
    v.fetch(slot);
    if constexpr (kGate) {
      o.fetch(slot);
    }
    grad.fetch(slot);
    if (!first) {
      state.fetch(slot);
    }
  };
  const auto read = [&](int slot, bool first) {
    Step step;
    step.q = q.read(slot);
    step.k = k.read(slot);
    step.v = v.read(slot);
    if constexpr (kGate) {
      step.o = o.read(slot);
    }
    step.grad = grad.read(slot);
    step.state = first ? initial : state.read(slot);
    return step;
  };
  const auto compute = [&](const Step& step, bool padded) {
    S x[4][kWidth] = {}, h[kWidth], grad_next[kWidth];
    step.q.unpack(x[0]);
    step.k.unpack(x[1]);
    step.v.unpack(x[2]);
    if constexpr (kGate) {
      step.o.unpack(x[3]);
    }
    step.grad.unpack(grad_next);
    step.state.unpack(h);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      carry[i] += grad_next[i];
      const Grad<S> g = lrn::backward<kTanh, kGate, S, Gates<T>>(x[0][i], x[1][i], x[2][i], x[3][i],
                                                                 h[i], next[i], carry[i]);
      x[0][i] = padded ? S(0) : g.q;
      x[1][i] = padded ? S(0) : g.k;
      x[2][i] = padded ? S(0) : g.v;
      x[3][i] = padded ? S(0) : g.o;
      carry[i] = padded ? carry[i] : g.h;
      next[i] = h[i];
    }
#pragma unroll
    for (int number = 0; number < kParts; ++number) {
      store<kWidth>(output.at + number * p.size, x[number]);
    }
    output.move();
  };

  run<kSteps<X>>(p.steps, padding, fetch, read, compute);
  if (a.grad_initial_state.data != nullptr) {
    store<kWidth>(
        a.grad_initial_state.data + lanes.sentence * a.grad_initial_state.batch_stride + column,
        carry);
  }
}

template <typename T, int kWidth>
auto pick(const ForwardArgs<T>& a) {
  const Problem& p = a.problem;
  return p.tanh ? (p.gate ? forward_kernel<T, kWidth, true, true>
                          : forward_kernel<T, kWidth, true, false>)
                : (p.gate ? forward_kernel<T, kWidth, false, true>
                          : forward_kernel<T, kWidth, false, false>);
}

template <typename T, int kWidth>
auto pick(const BackwardArgs<T>& a) {
  const Problem& p = a.problem;
  return p.tanh ? (p.gate ? backward_kernel<T, kWidth, true, true>
                          : backward_kernel<T, kWidth, true, false>)
                : (p.gate ? backward_kernel<T, kWidth, false, true>
                          : backward_kernel<T, kWidth, false, false>);
}

// Puts a kernel on the stream: the widest accesses, of 16 bytes at most, that alignment allows and
// that leave enough threads to each multiprocessor.
template <typename T, template <typename> class Args, int kWidth = 16 / sizeof(T)>
cudaError_t launch(const Args<T>& a, int multiprocessors, cudaStream_t stream) {
  const Problem& p = a.problem;
  const int64_t threads = p.batch * p.directions * p.size / kWidth;
  if constexpr (kWidth > 1) {
    if (p.size % kWidth != 0 || !a.aligned(kWidth) || threads < 96LL * multiprocessors) {
      return launch<T, Args, kWidth / 2>(a, multiprocessors, stream);
    }
  }
  if (threads == 0) {
    return cudaSuccess;
  }
  const unsigned block = threads < kBlock * int64_t(multiprocessors) ? 32 : kBlock;
  void* parameters[] = {const_cast<Args<T>*>(&a)};
  return cudaLaunchKernel(pick<T, kWidth>(a),
                          dim3(static_cast<unsigned>((threads + block - 1) / block)), dim3(block),
                          parameters, 0, stream);
}

}  // namespace cuda
}  // namespace lrn
