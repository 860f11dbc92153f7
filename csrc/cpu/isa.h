// Instruction sets. A kernel file compiles itself once per instruction set into one binary, and picks at load:
//
//   #define LF_THIS_FILE "combinator.cpp"
//   #include "foreach_isa.h"                     // includes the file again, once per instruction set
//   namespace ladderfast { namespace LF_ISA { ... kernels ... } }
//   #if LF_DISPATCH                              // seen once, after all of them
//   ... LF_SELECT(kernel) is the version for this machine ...
//   #endif
//
// Nothing but C headers may be included by a kernel file: an inline function of the C++ library compiled for AVX-512
// could be the copy that the linker keeps for everybody.
#pragma once

#include <stdint.h>
#include <string.h>

#if !defined(LF_MULTI_ISA)  // a test asks for 0, to see what other processors get
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define LF_MULTI_ISA 1
#else
#define LF_MULTI_ISA 0
#endif
#endif
#if LF_MULTI_ISA
#include <immintrin.h>
#endif

#include "../bfloat16.h"
#include "../math/host_device.h"

namespace ladderfast::cpu {

enum Isa { kBaseline, kAvx2, kAvx512 };

// The best instruction set of this machine; LADDERFAST_ISA=baseline|avx2|avx512 asks for a lesser one.
Isa isa();

}  // namespace ladderfast::cpu

#if LF_MULTI_ISA
#define LF_SELECT(kernel)                                                     \
    (::ladderfast::cpu::isa() == ::ladderfast::cpu::kAvx512 ? &avx512::kernel \
     : ::ladderfast::cpu::isa() == ::ladderfast::cpu::kAvx2 ? &avx2::kernel   \
                                                            : &baseline::kernel)
#else
#define LF_SELECT(kernel) (&baseline::kernel)
#endif
