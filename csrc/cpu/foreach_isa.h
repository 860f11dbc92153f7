// Includes LF_THIS_FILE once per instruction set with LF_ISA and LF_VECTOR_BYTES set, the last time (baseline) with
// LF_DISPATCH as well. See isa.h. No include guard: kernel files include it at their top, also when they are being
// included from here, where it does nothing.
#include "isa.h"

#ifndef LF_ISA

#if LF_MULTI_ISA

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define LF_ISA avx512
#define LF_VECTOR_BYTES 64
#define LF_DISPATCH 0
#include LF_THIS_FILE
#undef LF_ISA
#undef LF_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define LF_ISA avx2
#define LF_VECTOR_BYTES 32
#include LF_THIS_FILE
#undef LF_ISA
#undef LF_VECTOR_BYTES
#undef LF_DISPATCH
#pragma GCC pop_options

#endif

#define LF_ISA baseline
#define LF_VECTOR_BYTES 16
#define LF_DISPATCH 1

#endif
