// What every device's implementation of the operators shares: the sizes of a problem, checked.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>

namespace lrn {

struct Sizes {
  int64_t steps, batch, directions, parts, width;  // width = directions * state size
  bool tanh;
};

// What the real kernels and those that only give shapes to tracing (meta) check. The wording for
// users is in fairseq_lrn/ops/; here is what keeps a direct call from reading memory that is not
// there. Sizes may be symbols.
inline void check_like(const char* what, const at::Tensor& x, const at::Tensor& other,
                       at::ScalarType dtype) {
  TORCH_CHECK(x.device() == other.device(), what, " must be on ", other.device(), ", but is on ",
              x.device());
  TORCH_CHECK(x.scalar_type() == dtype, what, " must be ", dtype, ", but is ", x.scalar_type());
}

inline void check_shape(const char* what, const at::Tensor& x, c10::SymIntArrayRef shape) {
  bool same = x.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) {
    same = x.sym_size(i).sym_eq(shape[i]).expect_true(__FILE__, __LINE__);
  }
  TORCH_CHECK(same, what, " must have shape ", shape, ", but has ", x.sym_sizes());
}

inline void check_scan(const at::Tensor& projections,
                       const std::optional<at::Tensor>& initial_state,
                       const std::optional<at::Tensor>& padding_mask, const std::string& activation,
                       bool output_gate, bool reverse, bool bidirectional) {
  TORCH_CHECK(activation == "tanh" || activation == "identity",
              "lrn_scan: activation must be tanh or identity, but is ", activation);
  TORCH_CHECK(!(reverse && bidirectional), "lrn_scan: reverse must be False with bidirectional");
  const at::ScalarType dtype = projections.scalar_type();
  TORCH_CHECK(
      dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
      "lrn_scan: projections must be float16, bfloat16, float32 or float64, but is ", dtype);
  TORCH_CHECK(projections.dim() == 3, "lrn_scan: projections must have 3 axes, but has ",
              projections.dim());
  const int64_t parts = output_gate ? 4 : 3, directions = bidirectional ? 2 : 1;
  const c10::SymInt steps = projections.sym_size(0), batch = projections.sym_size(1),
                    width = projections.sym_size(2);
  TORCH_SYM_CHECK((width % (parts * directions)).sym_eq(0),
                  "lrn_scan: projections must have a last axis that is a multiple of ",
                  parts * directions, ", but has ", width);
  if (initial_state) {
    check_like("lrn_scan: initial_state", *initial_state, projections, dtype);
    check_shape("lrn_scan: initial_state", *initial_state, {batch, width / parts});
  }
  if (padding_mask) {
    check_like("lrn_scan: padding_mask", *padding_mask, projections, at::kBool);
    check_shape("lrn_scan: padding_mask", *padding_mask, {batch, steps});
  }
}

// Likewise for what lrn_scan_backward takes besides.
inline void check_states(const at::Tensor& grad_output, const at::Tensor& output,
                         const at::Tensor& projections, bool output_gate) {
  const c10::SymInt width = projections.sym_size(2) / (output_gate ? 4 : 3);
  for (const auto& [name, x] : {std::pair("lrn_scan_backward: grad_output", grad_output),
                                std::pair("lrn_scan_backward: output", output)}) {
    check_like(name, x, projections, projections.scalar_type());
    check_shape(name, x, {projections.sym_size(0), projections.sym_size(1), width});
  }
}

inline Sizes sizes(const at::Tensor& projections, const std::string& activation, bool output_gate,
                   bool bidirectional) {
  const int64_t parts = output_gate ? 4 : 3;
  return {projections.size(0),         projections.size(1), bidirectional ? 2 : 1, parts,
          projections.size(2) / parts, activation == "tanh"};
}

// The operator lrn_scan, on whatever device its tensors are.
at::Tensor scan(const at::Tensor& projections, const std::optional<at::Tensor>& initial_state,
                const std::optional<at::Tensor>& padding_mask, const std::string& activation,
                bool output_gate, bool reverse, bool bidirectional);

// As at::linear, on the CPU; its gradients are the operator's of this name.
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias);

// The bytes of a mask. Any that is not 0 is True; as a bool of C++, one that is not 1 either would
// be undefined.
inline const uint8_t* bytes(const at::Tensor& mask) {
  return static_cast<const uint8_t*>(mask.const_data_ptr());
}

// Kernels take any strides but that of the last axis.
inline at::Tensor rows_contiguous(const at::Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

}  // namespace lrn
