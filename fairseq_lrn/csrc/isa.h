// Loops that are compiled once per instruction set, of which the one in use is picked at each call:
//
//   #define ENTRY(suffix, attribute) attribute void name_##suffix() { loop(); }
//   LRN_EACH_ISA(ENTRY)
//   LRN_PICK(name, )();
//
// What an entry calls must be inlined, and so be compiled for its instruction set.
#pragma once

namespace lrn {

// From the slowest to the fastest. Loops are compiled for kDefault, kAvx2 and kAvx512;
// the others have products of int8 and bfloat16 besides, which are instructions by name.
enum class Isa { kDefault, kAvx2, kAvx2Vnni, kAvx512, kAvx512Vnni, kAvx512Bf16 };

// The one in use: the best that runs here, unless FAIRSEQ_LRN_CPU_CAPABILITY or the operator
// set_cpu_capability names another.
Isa isa();

// Whether compilers, and so their assemblers, know these.
#if __has_include(<avxvnniintrin.h>)
#define LRN_AVX2_VNNI 1
#else
#define LRN_AVX2_VNNI 0
#endif
#if __has_include(<avx512bf16intrin.h>)
#define LRN_AVX512_BF16 1
#else
#define LRN_AVX512_BF16 0
#endif

}  // namespace lrn

#if defined(__x86_64__) && defined(__GNUC__)
#if defined(__clang__)
#define LRN_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,fma"
#else  // GCC takes shorter vectors unless told
#define LRN_AVX512 "avx512f,avx512bw,avx512vl,avx512dq,fma,prefer-vector-width=512"
#endif
#define LRN_EACH_ISA(ENTRY)                        \
  ENTRY(default, )                                 \
  ENTRY(avx2, __attribute__((target("avx2,fma")))) \
  ENTRY(avx512, __attribute__((target(LRN_AVX512))))
#define LRN_PICK(name, ...)                                    \
  (lrn::isa() >= lrn::Isa::kAvx512 ? name##_avx512 __VA_ARGS__ \
   : lrn::isa() >= lrn::Isa::kAvx2 ? name##_avx2 __VA_ARGS__   \
                                   : name##_default __VA_ARGS__)
#else
#define LRN_EACH_ISA(ENTRY) ENTRY(default, )
#define LRN_PICK(name, ...) (name##_default __VA_ARGS__)
#endif
