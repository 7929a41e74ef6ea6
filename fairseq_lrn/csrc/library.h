// Registers operators as TORCH_LIBRARY_FRAGMENT and TORCH_LIBRARY_IMPL do, but once in a process:
// what PyTorch throws at a second copy of this library ends the process. A second copy registers
// nothing, says so, and the first one stays in use (fairseq_lrn/ops/_library.py raises before).
//
//   LRN_LIBRARY(m) { m.def("name() -> str"); }
//   LRN_LIBRARY_IMPL(CPU, m) { m.impl("name", function); }
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>

namespace lrn {

C10_HIDDEN bool is_first_copy();

class Registration {
 public:
  Registration(torch::Library::Kind kind, std::optional<c10::DispatchKey> key, const char* file,
               uint32_t line, void (*add)(torch::Library&)) {
    if (is_first_copy()) {
      add(library_.emplace(kind, "fairseq_lrn", key, file, line));
    }
  }

 private:
  std::optional<torch::Library> library_;
};

// The operator of a name, as "fairseq_lrn::linear", to be called through the dispatcher; F is the
// type of its kernels.
template <typename F>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

}  // namespace lrn

#define LRN_REGISTER(kind, key, m, id)                                                \
  static void C10_CONCATENATE(lrn_add_, id)(torch::Library&);                         \
  static const lrn::Registration C10_CONCATENATE(lrn_registration_, id)(              \
      torch::Library::kind, key, __FILE__, __LINE__, &C10_CONCATENATE(lrn_add_, id)); \
  void C10_CONCATENATE(lrn_add_, id)(torch::Library & m)
#define LRN_LIBRARY(m) LRN_REGISTER(FRAGMENT, std::nullopt, m, C10_UID)
#define LRN_LIBRARY_IMPL(key, m) LRN_REGISTER(IMPL, c10::DispatchKey::key, m, C10_UID)
