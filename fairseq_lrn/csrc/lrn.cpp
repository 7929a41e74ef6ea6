// The operators as PyTorch sees them: schemas, shapes for tracing, autograd, autocast.
// Kernels register themselves, a file per device.
#include "lrn.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor lrn::scan(const Tensor& projections, const OptionalTensor& initial_state,
                 const OptionalTensor& padding_mask, const std::string& activation,
                 bool output_gate, bool reverse, bool bidirectional) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fairseq_lrn::lrn_scan", "")
                             .typed<decltype(lrn::scan)>();
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
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fairseq_lrn::lrn_scan_backward", "")
                             .typed<decltype(scan_backward)>();
  return op.call(grad_output, projections, output, initial_state, padding_mask, activation,
                 output_gate, reverse, bidirectional);
}

Tensor scan_meta(const Tensor& projections, const OptionalTensor&, const OptionalTensor&,
                 const std::string&, bool output_gate, bool, bool) {
  return projections.new_empty_symint({projections.sym_size(0), projections.sym_size(1),
                                       projections.sym_size(2) / (output_gate ? 4 : 3)});
}

std::tuple<Tensor, Tensor> scan_backward_meta(const Tensor&, const Tensor& projections,
                                              const Tensor&, const OptionalTensor&,
                                              const OptionalTensor&, const std::string&,
                                              bool output_gate, bool, bool) {
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

TORCH_LIBRARY(fairseq_lrn, m) {
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

TORCH_LIBRARY_IMPL(fairseq_lrn, Meta, m) {
  m.impl("lrn_scan", scan_meta);
  m.impl("lrn_scan_backward", scan_backward_meta);
}

TORCH_LIBRARY_IMPL(fairseq_lrn, Autograd, m) {
  m.impl("lrn_scan", scan_autograd);
  m.impl("lrn_scan_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(fairseq_lrn, AutocastCPU, m) {
  m.impl("lrn_scan", scan_autocast<c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(fairseq_lrn, AutocastCUDA, m) {
  m.impl("lrn_scan", scan_autocast<c10::DispatchKey::AutocastCUDA>);
}
