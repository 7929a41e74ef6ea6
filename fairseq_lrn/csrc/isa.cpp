// The choice of the instruction set, and the operators that tell and change it.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "library.h"

namespace {

using lrn::Isa;

constexpr const char* kNames[] = {"default", "avx2", "avx512"};  // in Isa's order

Isa best() {
#if defined(LRN_AVX512)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")
               ? Isa::kAvx512
               : Isa::kAvx2;
  }
#endif
  return Isa::kDefault;
}

Isa parse(const std::string& name, const char* argument) {
  const int available = static_cast<int>(best());
  for (int i = 0; i <= available; ++i) {
    if (name == kNames[i]) {
      return static_cast<Isa>(i);
    }
  }
  constexpr const char* kLists[] = {"default", "default or avx2", "default, avx2 or avx512"};
  TORCH_CHECK_VALUE(false, argument, " must be ", kLists[available], " on this machine, but is '",
                    name, "'");
}

Isa at_first() {
  const char* wish = std::getenv("FAIRSEQ_LRN_CPU_CAPABILITY");
  return wish == nullptr || *wish == '\0' ? best() : parse(wish, "FAIRSEQ_LRN_CPU_CAPABILITY");
}

std::atomic<Isa>& in_use() {
  static std::atomic<Isa> isa(at_first());  // raises where an operator can, not at load
  return isa;
}

}  // namespace

Isa lrn::isa() { return in_use().load(std::memory_order_relaxed); }

LRN_LIBRARY(m) {
  m.def("cpu_capability() -> str",
        [] { return std::string(kNames[static_cast<int>(lrn::isa())]); });
  m.def("set_cpu_capability(str name) -> ()",
        [](const std::string& name) { in_use() = parse(name, "name"); });
}
