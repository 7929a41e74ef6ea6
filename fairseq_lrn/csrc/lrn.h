// What every device's implementation of the operators shares: the sizes of a problem, checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace lrn {

struct Sizes {
  int64_t steps, batch, directions, parts, width;  // width = directions * state size
  bool tanh;
};

// The wording for users is in fairseq_lrn/ops/scan.py; here is what keeps a direct call from
// reading memory that is not there.
inline Sizes check_sizes(const at::Tensor& projections,
                         const std::optional<at::Tensor>& initial_state,
                         const std::optional<at::Tensor>& padding_mask,
                         const std::string& activation, bool output_gate, bool reverse,
                         bool bidirectional) {
  TORCH_CHECK(activation == "tanh" || activation == "identity", "lrn_scan: unknown activation ",
              activation);
  TORCH_CHECK(!(reverse && bidirectional),
              "lrn_scan: reverse and bidirectional exclude each other");
  TORCH_CHECK(projections.dim() == 3, "lrn_scan: projections must have 3 dimensions");
  Sizes s;
  s.directions = bidirectional ? 2 : 1;
  s.parts = output_gate ? 4 : 3;
  s.steps = projections.size(0);
  s.batch = projections.size(1);
  s.width = projections.size(2) / s.parts;
  s.tanh = activation == "tanh";
  TORCH_CHECK(projections.size(2) % (s.parts * s.directions) == 0,
              "lrn_scan: the last axis of projections is not a multiple of ",
              s.parts * s.directions);
  if (initial_state) {
    TORCH_CHECK(initial_state->dim() == 2 && initial_state->size(0) == s.batch &&
                    initial_state->size(1) == s.width &&
                    initial_state->scalar_type() == projections.scalar_type() &&
                    initial_state->device() == projections.device(),
                "lrn_scan: initial_state does not fit projections");
  }
  if (padding_mask) {
    TORCH_CHECK(padding_mask->dim() == 2 && padding_mask->size(0) == s.batch &&
                    padding_mask->size(1) == s.steps && padding_mask->scalar_type() == at::kBool &&
                    padding_mask->device() == projections.device(),
                "lrn_scan: padding_mask does not fit projections");
  }
  return s;
}

// Likewise for what lrn_scan_backward takes besides.
inline void check_states(const at::Tensor& grad_output, const at::Tensor& output,
                         const at::Tensor& projections, const Sizes& s) {
  for (const at::Tensor& x : {grad_output, output}) {
    TORCH_CHECK(x.sizes() == at::IntArrayRef({s.steps, s.batch, s.width}) &&
                    x.scalar_type() == projections.scalar_type() &&
                    x.device() == projections.device(),
                "lrn_scan_backward: grad_output and output must be as lrn_scan's result");
  }
}

// The operator lrn_scan, on whatever device its tensors are.
at::Tensor scan(const at::Tensor& projections, const std::optional<at::Tensor>& initial_state,
                const std::optional<at::Tensor>& padding_mask, const std::string& activation,
                bool output_gate, bool reverse, bool bidirectional);

// As at::linear, on the CPU; its gradients are the operator's of this name.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias);

// Kernels take any strides but that of the last axis.
inline at::Tensor rows_contiguous(const at::Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

}  // namespace lrn
