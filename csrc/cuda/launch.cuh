// Launches through the runtime's C++ function, so that the sources are plain C++ to any compiler.
#pragma once

#include <cuda_runtime.h>
#include <limits.h>
#include <stdint.h>

namespace ladderfast::cuda {

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, void* stream, Args... args) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace ladderfast::cuda
