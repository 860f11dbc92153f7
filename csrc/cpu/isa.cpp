#include "isa.h"

#include <stdlib.h>

#if LF_MULTI_ISA
#include <cpuid.h>
#endif

namespace ladderfast::cpu {

#if LF_MULTI_ISA
// What x86-64-v3 has beside them, of which old compilers cannot be asked by name.
static bool others_of_v3() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_MOVBE) || !(c & bit_F16C)) return false;
    return __get_cpuid(0x80000001, &a, &b, &c, &d) && (c & bit_LZCNT);
}
#endif

static Isa best() {
#if LF_MULTI_ISA
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && others_of_v3();
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? kAvx512 : v3 ? kAvx2 : kBaseline;
#else
    return kBaseline;
#endif
}

static Isa choose() {
    const Isa machine = best();
    const char* asked = getenv("LADDERFAST_ISA");
    if (asked == nullptr) return machine;
    const Isa wanted = !strcmp(asked, "baseline") ? kBaseline : !strcmp(asked, "avx2") ? kAvx2 : kAvx512;
    return wanted < machine ? wanted : machine;
}

static const Isa chosen = choose();

Isa isa() { return chosen; }

const char* instruction_set() { return chosen == kAvx512 ? "avx512" : chosen == kAvx2 ? "avx2" : "baseline"; }

}  // namespace ladderfast::cpu
