// C functions that instantiate every kernel: compiled by a host compiler with the shim, and called
// by test_lrn_cuda.py; or by nvcc, for its report.
#include "lrn_cuda.cuh"

namespace {

template <template <typename> class Args>
int launch(int dtype, const void* args, int multiprocessors) {
  switch (dtype) {
    case 0:
      return lrn::cuda::launch(*static_cast<const Args<float>*>(args), multiprocessors, nullptr);
    case 1:
      return lrn::cuda::launch(*static_cast<const Args<double>*>(args), multiprocessors, nullptr);
    case 2:
      return lrn::cuda::launch(*static_cast<const Args<__half>*>(args), multiprocessors, nullptr);
    case 3:
      return lrn::cuda::launch(*static_cast<const Args<__nv_bfloat16>*>(args), multiprocessors,
                               nullptr);
  }
  return -1;
}

}  // namespace

extern "C" int forward(int dtype, const void* args, int multiprocessors) {
  return launch<lrn::cuda::ForwardArgs>(dtype, args, multiprocessors);
}

extern "C" int backward(int dtype, const void* args, int multiprocessors) {
  return launch<lrn::cuda::BackwardArgs>(dtype, args, multiprocessors);
}

namespace {

template <typename T>
struct GateArgs {
  const float* x;
  float *sigmoid, *tanh;
  int64_t count;
};

template <typename T>
__global__ void gates_kernel(const GateArgs<T> a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < a.count) {
    a.sigmoid[i] = lrn::cuda::Gates<T>::sigmoid(a.x[i]);
    a.tanh[i] = lrn::cuda::Gates<T>::tanh(a.x[i]);
  }
}

template <typename T>
int gates(GateArgs<T> args) {
  void* parameters[] = {&args};
  const unsigned blocks = static_cast<unsigned>((args.count + 255) / 256);
  return cudaLaunchKernel(gates_kernel<T>, dim3(blocks), dim3(256), parameters, 0, nullptr);
}

}  // namespace

// On the default stream.
extern "C" int gates(int dtype, const float* x, float* sigmoid, float* tanh, int64_t count) {
  return dtype == 0 ? gates(GateArgs<float>{x, sigmoid, tanh, count})
                    : gates(GateArgs<__nv_bfloat16>{x, sigmoid, tanh, count});
}

#ifndef __CUDACC__
extern "C" void copy_late(bool late) { lrn::cuda::late = late; }
#endif
