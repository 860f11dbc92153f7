// What ladderfast.info reports about the extension. Nothing here touches a tensor.
#include <pybind11/pybind11.h>

#include "combinator.h"

namespace py = pybind11;

static const char* cpu_vendor() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("amd")) return "amd";
    if (__builtin_cpu_is("intel")) return "intel";
#endif
    return "other";
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build facts of the ladderfast extension; loading it registers torch.ops.ladderfast.";
    m.def("instruction_set", &ladderfast::cpu::instruction_set,
          "Instruction set that the CPU kernels use on this machine.");
    m.def("cpu_vendor", &cpu_vendor, "Maker of this machine's processor: amd, intel or other.");
#if defined(__clang__)
    m.attr("compiler") = __VERSION__;
#else
    m.attr("compiler") = "GCC " __VERSION__;
#endif
    m.attr("torch_version") = LADDERFAST_TORCH_VERSION;
#ifdef LADDERFAST_WITH_CUDA
    m.attr("cuda") = true;
    m.attr("cuda_architectures") = LADDERFAST_CUDA_ARCHITECTURES;
    m.attr("cuda_version") = LADDERFAST_CUDA_VERSION;
#else
    m.attr("cuda") = false;
    m.attr("cuda_architectures") = "";
    m.attr("cuda_version") = "";
#endif
}
