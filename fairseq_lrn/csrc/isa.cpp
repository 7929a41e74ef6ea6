// The choice of the instruction set, and the operators that tell and change it.
#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "library.h"

namespace {

using lrn::Isa;

constexpr const char* kNames[] = {"default", "avx2",        "avx2_vnni",
                                  "avx512",  "avx512_vnni", "avx512_bf16"};  // in Isa's order
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

bool runs_here(Isa isa) {
#if defined(LRN_AVX512)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool avx512_vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  switch (isa) {
    case Isa::kDefault:
      break;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx2Vnni:
#if LRN_AVX2_VNNI
      return avx2 && __builtin_cpu_supports("avxvnni");
#else
      return false;
#endif
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Vnni:
      return avx512_vnni;
    case Isa::kAvx512Bf16:
#if LRN_AVX512_BF16
      return avx512_vnni && __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
  }
#endif
  return isa == Isa::kDefault;
}

Isa best() {
  int i = kCount - 1;
  while (!runs_here(static_cast<Isa>(i))) {
    --i;
  }
  return static_cast<Isa>(i);
}

Isa parse(const std::string& name, const char* argument) {
  std::string list;
  for (int i = 0; i < kCount; ++i) {
    if (runs_here(static_cast<Isa>(i))) {
      if (name == kNames[i]) {
        return static_cast<Isa>(i);
      }
      list += (list.empty() ? "" : ", ") + std::string(kNames[i]);
    }
  }
  TORCH_CHECK_VALUE(false, argument, " must be one of ", list, " on this machine, but is '", name,
                    "'");
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
