// The operators as PyTorch sees them: schemas, shapes for tracing, autograd, autocast.
// Kernels register themselves, a file per device.
#include "lrn.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "library.h"

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

bool lrn::is_first_copy() {
  static const bool first = [] {
    const bool there =
        c10::Dispatcher::singleton().findSchema({"fairseq_lrn::lrn_scan", ""}).has_value();
    if (there) {
      TORCH_WARN(
          "Another copy of fairseq_lrn's operators is loaded already and stays in use; this copy "
          "is left out.");
    }
    return !there;
  }();
  return first;
}

Tensor lrn::scan(const Tensor& projections, const OptionalTensor& initial_state,
                 const OptionalTensor& padding_mask, const std::string& activation,
                 bool output_gate, bool reverse, bool bidirectional) {
  static const auto op = lrn::op<decltype(lrn::scan)>("fairseq_lrn::lrn_scan");
  return op.call(projections, initial_state, padding_mask, activation, output_gate, reverse,
                 bidirectional);
}

namespace {

using lrn::scan;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

std::tuple<Tensor, Tensor> scan_backward(const Tensor& grad_output, const Tensor& projections,
                                         const Tensor& output, const OptionalTensor& initial_state,
                                         const OptionalTensor& padding_mask,
                                         const std::string& activation, bool output_gate,
                                         bool reverse, bool bidirectional) {
  static const auto op = lrn::op<decltype(scan_backward)>("fairseq_lrn::lrn_scan_backward");
  return op.call(grad_output, projections, output, initial_state, padding_mask, activation,
                 output_gate, reverse, bidirectional);
}

Tensor scan_meta(const Tensor& projections, const OptionalTensor& initial_state,
                 const OptionalTensor& padding_mask, const std::string& activation,
                 bool output_gate, bool reverse, bool bidirectional) {
  lrn::check_scan(projections, initial_state, padding_mask, activation, output_gate, reverse,
                  bidirectional);
  return projections.new_empty_symint({projections.sym_size(0), projections.sym_size(1),
                                       projections.sym_size(2) / (output_gate ? 4 : 3)});
}

std::tuple<Tensor, Tensor> scan_backward_meta(const Tensor& grad_output, const Tensor& projections,
                                              const Tensor& output,
                                              const OptionalTensor& initial_state,
                                              const OptionalTensor& padding_mask,
                                              const std::string& activation, bool output_gate,
                                              bool reverse, bool bidirectional) {
  lrn::check_scan(projections, initial_state, padding_mask, activation, output_gate, reverse,
                  bidirectional);
  lrn::check_states(grad_output, output, projections, output_gate);
  return {projections.new_empty_symint(projections.sym_sizes()),
          projections.new_empty_symint(
              {projections.sym_size(1), projections.sym_size(2) / (output_gate ? 4 : 3)})};
}

OptionalTensor if_defined(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

struct Scan : torch::autograd::Function<Scan> {
  static Tensor forward(AutogradContext* context, const Tensor& projections,
                        const OptionalTensor& initial_state, const OptionalTensor& padding_mask,
                        const std::string& activation, bool output_gate, bool reverse,
                        bool bidirectional) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor output = scan(projections, initial_state, padding_mask, activation, output_gate,
                               reverse, bidirectional);
    context->save_for_backward(
        {projections, output, initial_state.value_or(Tensor()), padding_mask.value_or(Tensor())});
    context->saved_data["activation"] = activation;
    context->saved_data["output_gate"] = output_gate;
    context->saved_data["reverse"] = reverse;
    context->saved_data["bidirectional"] = bidirectional;
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    auto& options = context->saved_data;
    auto [projections, initial_state] =
        scan_backward(grads[0], saved[0], saved[1], if_defined(saved[2]), if_defined(saved[3]),
                      options["activation"].toStringRef(), options["output_gate"].toBool(),
                      options["reverse"].toBool(), options["bidirectional"].toBool());
    if (!saved[2].defined()) {
      initial_state = Tensor();
    }
    return {projections, initial_state, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

Tensor scan_autograd(const Tensor& projections, const OptionalTensor& initial_state,
                     const OptionalTensor& padding_mask, const std::string& activation,
                     bool output_gate, bool reverse, bool bidirectional) {
  return Scan::apply(projections, initial_state, padding_mask, activation, output_gate, reverse,
                     bidirectional);
}

struct ScanBackward : torch::autograd::Function<ScanBackward> {
  static variable_list forward(AutogradContext*, const Tensor& grad_output,
                               const Tensor& projections, const Tensor& output,
                               const OptionalTensor& initial_state,
                               const OptionalTensor& padding_mask, const std::string& activation,
                               bool output_gate, bool reverse, bool bidirectional) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [projections_grad, state_grad] =
        scan_backward(grad_output, projections, output, initial_state, padding_mask, activation,
                      output_gate, reverse, bidirectional);
    return {projections_grad, state_grad};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false,
        "lrn_scan is differentiable only once by backward(): second derivatives are there in "
        "torch.func and with fairseq_lrn.ops.lrn_scan_reference");
  }
};

std::tuple<Tensor, Tensor> scan_backward_autograd(const Tensor& grad_output,
                                                  const Tensor& projections, const Tensor& output,
                                                  const OptionalTensor& initial_state,
                                                  const OptionalTensor& padding_mask,
                                                  const std::string& activation, bool output_gate,
                                                  bool reverse, bool bidirectional) {
  const variable_list grads =
      ScanBackward::apply(grad_output, projections, output, initial_state, padding_mask, activation,
                          output_gate, reverse, bidirectional);
  return {grads[0], grads[1]};
}

template <c10::DispatchKey kAutocast>
Tensor scan_autocast(const Tensor& projections, const OptionalTensor& initial_state,
                     const OptionalTensor& padding_mask, const std::string& activation,
                     bool output_gate, bool reverse, bool bidirectional) {
  const c10::impl::ExcludeDispatchKeyGuard guard(kAutocast);
  const OptionalTensor state =
      initial_state ? OptionalTensor(initial_state->to(projections.scalar_type())) : std::nullopt;
  return scan(projections, state, padding_mask, activation, output_gate, reverse, bidirectional);
}

}  // namespace

LRN_LIBRARY(m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "lrn_scan(Tensor projections, Tensor? initial_state=None, Tensor? padding_mask=None, *, "
      "str activation=\"tanh\", bool output_gate=False, bool reverse=False, bool "
      "bidirectional=False) "
      "-> Tensor",
      tags);
  m.def(
      "lrn_scan_backward(Tensor grad_output, Tensor projections, Tensor output, Tensor? "
      "initial_state, "
      "Tensor? padding_mask, *, str activation, bool output_gate, bool reverse, bool "
      "bidirectional) "
      "-> (Tensor, Tensor)",
      tags);
}

LRN_LIBRARY_IMPL(Meta, m) {
  m.impl("lrn_scan", scan_meta);
  m.impl("lrn_scan_backward", scan_backward_meta);
}

LRN_LIBRARY_IMPL(Autograd, m) {
  m.impl("lrn_scan", scan_autograd);
  m.impl("lrn_scan_backward", scan_backward_autograd);
}

LRN_LIBRARY_IMPL(AutocastCPU, m) {
  m.impl("lrn_scan", scan_autocast<c10::DispatchKey::AutocastCPU>);
}

LRN_LIBRARY_IMPL(AutocastCUDA, m) {
  m.impl("lrn_scan", scan_autocast<c10::DispatchKey::AutocastCUDA>);
}
