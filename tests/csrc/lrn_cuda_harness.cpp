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

#ifndef __CUDACC__
extern "C" void copy_late(bool late) { lrn::cuda::late = late; }

namespace {

template <typename T>
void gates(const float* x, float* sigmoid, float* tanh, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    sigmoid[i] = lrn::cuda::Gates<T>::sigmoid(x[i]);
    tanh[i] = lrn::cuda::Gates<T>::tanh(x[i]);
  }
}

}  // namespace

extern "C" void gates(int dtype, const float* x, float* sigmoid, float* tanh, int64_t count) {
  (dtype == 0 ? gates<float> : gates<__nv_bfloat16>)(x, sigmoid, tanh, count);
}
#endif
