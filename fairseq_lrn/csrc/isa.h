// Loops that are compiled once per instruction set, of which the best that runs here is picked:
//
//   #define ENTRY(suffix, attribute) attribute void name_##suffix() { loop(); }
//   LRN_EACH_ISA(ENTRY)
//   LRN_PICK(name, )();
//
// What an entry calls must be inlined, and so be compiled for its instruction set.
#pragma once

#include <cstdlib>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)

namespace lrn {

enum class Isa { kDefault, kAvx2, kAvx512 };

// FAIRSEQ_LRN_CPU_CAPABILITY (default, avx2 or avx512) lowers the choice.
inline Isa pick_isa() {
  const char* wish = std::getenv("FAIRSEQ_LRN_CPU_CAPABILITY");
  const std::string limit = wish == nullptr ? "avx512" : wish;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (limit == "default" || !avx2) {
    return Isa::kDefault;
  }
  return limit == "avx2" || !avx512 ? Isa::kAvx2 : Isa::kAvx512;
}

inline const Isa kIsa = pick_isa();

}  // namespace lrn

#if defined(__clang__)
#define LRN_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,fma"
#else  // GCC takes shorter vectors unless told
#define LRN_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512"
#endif
#define LRN_EACH_ISA(ENTRY)                        \
  ENTRY(default, )                                 \
  ENTRY(avx2, __attribute__((target("avx2,fma")))) \
  ENTRY(avx512, __attribute__((target(LRN_AVX512))))
#define LRN_PICK(name, ...)                                   \
  (lrn::kIsa == lrn::Isa::kAvx512 ? name##_avx512 __VA_ARGS__ \
   : lrn::kIsa == lrn::Isa::kAvx2 ? name##_avx2 __VA_ARGS__   \
                                  : name##_default __VA_ARGS__)
#else
#define LRN_EACH_ISA(ENTRY) ENTRY(default, )
#define LRN_PICK(name, ...) (name##_default __VA_ARGS__)
#endif
