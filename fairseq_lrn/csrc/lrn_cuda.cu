// The operators on CUDA devices: tensors in, kernels of lrn_cuda.cuh on the current stream.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <type_traits>

#include "library.h"
#include "lrn.h"
#include "lrn_cuda.cuh"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// CUDA's own name for an ATen element type of the same bits.
template <typename T>
using Element =
    std::conditional_t<std::is_same_v<T, at::Half>, __half,
                       std::conditional_t<std::is_same_v<T, at::BFloat16>, __nv_bfloat16, T>>;

// The kernels read elements of less than 4 bytes by the aligned words around them: the storage must
// not end within one.
Tensor whole_words(const Tensor& x) {
  if (x.storage().nbytes() % 4 == 0) {
    return x;
  }
  return at::empty({(x.numel() + 3) / 4 * 4}, x.options())
      .narrow(0, 0, x.numel())
      .view(x.sizes())
      .copy_(x);
}

// Of (steps, batch, width).
template <typename T>
lrn::cuda::Sequence<T> sequence(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1)};
}

// Of (batch, width), if it is there.
template <typename T>
lrn::cuda::Sequence<T> state(const OptionalTensor& x) {
  return x ? lrn::cuda::Sequence<T>{static_cast<T*>(x->data_ptr()), 0, x->stride(0)}
           : lrn::cuda::Sequence<T>{nullptr, 0, 0};
}

lrn::cuda::Sequence<const uint8_t> mask(const OptionalTensor& x) {
  return x ? lrn::cuda::Sequence<const uint8_t>{lrn::bytes(*x), x->stride(1), x->stride(0)}
           : lrn::cuda::Sequence<const uint8_t>{nullptr, 0, 0};
}

lrn::cuda::Problem problem(const lrn::Sizes& s, bool reverse) {
  return {s.steps, s.batch, s.directions, s.width / s.directions, reverse, s.tanh, s.parts == 4};
}

template <typename Args>
void launch(const Args& args, const char* name, const Tensor& projections) {
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                        projections.get_device()));
  const cudaError_t error =
      lrn::cuda::launch(args, multiprocessors, c10::cuda::getCurrentCUDAStream());
  if (error != cudaSuccess) {
    cudaGetLastError();  // reported here, and not once more by whoever asks next
  }
  TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error),
              " at the launch for projections of shape ", projections.sizes(), " and type ",
              projections.scalar_type(), " on ", projections.device());
}

Tensor scan_cuda(const Tensor& projections, const OptionalTensor& initial_state,
                 const OptionalTensor& padding_mask, const std::string& activation,
                 bool output_gate, bool reverse, bool bidirectional) {
  lrn::check_scan(projections, initial_state, padding_mask, activation, output_gate, reverse,
                  bidirectional);
  const lrn::Sizes s = lrn::sizes(projections, activation, output_gate, bidirectional);
  const c10::cuda::CUDAGuard guard(projections.device());
  const Tensor input = whole_words(lrn::rows_contiguous(projections));
  const OptionalTensor initial =
      initial_state ? OptionalTensor(lrn::rows_contiguous(*initial_state)) : std::nullopt;
  const Tensor output = at::empty({s.steps, s.batch, s.width}, input.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "lrn_scan", [&] {
    using T = Element<scalar_t>;
    launch(
        lrn::cuda::ForwardArgs<T>{problem(s, reverse), sequence<const T>(input),
                                  state<const T>(initial), mask(padding_mask), sequence<T>(output)},
        "lrn_scan", input);
  });
  return output;
}

std::tuple<Tensor, Tensor> scan_backward_cuda(const Tensor& grad_output, const Tensor& projections,
                                              const Tensor& output,
                                              const OptionalTensor& initial_state,
                                              const OptionalTensor& padding_mask,
                                              const std::string& activation, bool output_gate,
                                              bool reverse, bool bidirectional) {
  lrn::check_scan(projections, initial_state, padding_mask, activation, output_gate, reverse,
                  bidirectional);
  lrn::check_states(grad_output, output, projections, output_gate);
  const lrn::Sizes s = lrn::sizes(projections, activation, output_gate, bidirectional);
  const c10::cuda::CUDAGuard guard(projections.device());
  const Tensor input = whole_words(lrn::rows_contiguous(projections));
  const Tensor states = whole_words(lrn::rows_contiguous(output));
  const Tensor grad = whole_words(lrn::rows_contiguous(grad_output));
  const OptionalTensor initial =
      initial_state ? OptionalTensor(lrn::rows_contiguous(*initial_state)) : std::nullopt;
  const Tensor grad_projections = at::empty(input.sizes(), input.options());
  const Tensor grad_state = at::empty({s.batch, s.width}, input.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "lrn_scan_backward", [&] {
        using T = Element<scalar_t>;
        launch(lrn::cuda::BackwardArgs<T>{problem(s, reverse), sequence<const T>(input),
                                          state<const T>(initial), mask(padding_mask),
                                          sequence<const T>(states), sequence<const T>(grad),
                                          sequence<T>(grad_projections), state<T>(grad_state)},
               "lrn_scan_backward", input);
      });
  return {grad_projections, grad_state};
}

}  // namespace

LRN_LIBRARY_IMPL(CUDA, m) {
  m.impl("lrn_scan", scan_cuda);
  m.impl("lrn_scan_backward", scan_backward_cuda);
}
