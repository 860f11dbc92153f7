// Kernels for test_shim.py: some that a GPU would run, each with a known result, and some with one fault each.
#include <cuda_runtime.h>
#include <stdint.h>

namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void warp_operations(const int* in, int* out) {
    const int lane = threadIdx.x % 32, value = in[threadIdx.x];
    int* row = out + threadIdx.x * 8;
    row[0] = __shfl_sync(kAll, value, 5);
    row[1] = __shfl_sync(kAll, value, lane + 1, 8);
    row[2] = __shfl_up_sync(kAll, value, 3, 16);
    row[3] = __shfl_down_sync(kAll, value, 3, 16);
    row[4] = __shfl_xor_sync(kAll, value, 9);
    row[5] = static_cast<int>(__ballot_sync(kAll, value % 3 == 0));
    row[6] = lane % 2 ? 0 : __shfl_sync(0x55555555u, value, 4);  // the even lanes among themselves
    row[7] = __syncthreads_count(value % 2);
}

// Sums of blocks by way of static and dynamic shared memory; `broken` leaves one barrier out.
__global__ void block_sums(const double* in, double* out, int broken) {
    __shared__ double partial[8];
    double* const all = ladderfast::cuda::dynamic_shared<double>();
    all[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
    if (broken != 1) __syncthreads();
    if (threadIdx.x % 32 == 0) {
        double sum = 0;
        for (int i = 0; i < 32; ++i) sum += all[threadIdx.x + i];
        partial[threadIdx.x / 32] = sum;
    }
    if (broken != 2) __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0;
        for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += partial[i];
        out[blockIdx.x] = sum;
    }
}

__global__ void last_block(int* out) {
    if (threadIdx.x == 0) *out = static_cast<int>(blockIdx.x);
}

__global__ void faulty(int fault, float* to, const float* from, int n) {
    __shared__ float shared[64];
    __shared__ float next[64];
    const int i = threadIdx.x;
    if (fault == 1 && i < 32) __syncthreads();  // some wait, others end
    if (fault == 2) {                           // all wait, in two places
        if (i < 32)
            __syncthreads();
        else
            __syncthreads();
    }
    if (fault == 3 && i != 7) __shfl_sync(kAll, i, 0);                         // lane 7 never comes
    if (fault == 4) to[n + i] = 0;                                             // past the end
    if (fault == 5) to[0] = from[n + 4096 + i];                                // far past the end
    if (fault == 6) const_cast<float*>(from)[i] = 0;                           // an input
    if (fault == 7) *reinterpret_cast<float4*>(to) = make_float4(0, 0, 0, 0);  // misaligned
    if (fault == 8) shared[i + 1] = from[0];                                   // thread 63: past a shared array
    if (fault == 9) to[i] = next[i] + shared[i];                               // shared memory that nobody wrote
    if (fault == 10) to[i] = from[i / (n - 64)];                               // division by zero where n = 64
    if (fault == 11) to[i] = *reinterpret_cast<const float*>(static_cast<uintptr_t>(64 + 4 * i));
    if (fault == 12 && i == 0) to[n] = 0;  // just past the end, on the page that still can be written
}

}  // namespace

extern "C" {

int run_warp_operations(const int* in, int* out, int threads) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1);
    config.blockDim = dim3(static_cast<unsigned>(threads));
    return cudaLaunchKernelEx(&config, warp_operations, in, out);
}

int run_block_sums(const double* in, double* out, int broken, int blocks, int threads) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(threads) * sizeof(double);
    return cudaLaunchKernelEx(&config, block_sums, in, out, broken);
}

int run_last_block(int* out, int blocks) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(32);
    return cudaLaunchKernelEx(&config, last_block, out);
}

int run_faulty(int fault, float* to, const float* from, int n) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(1);
    config.blockDim = dim3(64);
    return cudaLaunchKernelEx(&config, faulty, fault, to, from, n);
}

int run_nothing(int blocks, int threads) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    return cudaLaunchKernelEx(&config, last_block, static_cast<int*>(nullptr));
}

// The conversions that stand in for ptx.cuh's.
void convert(const float* in, uint32_t* bfloat16, uint32_t* float16, int n) {
    for (int i = 0; i < n; ++i) {
        bfloat16[i] = ladderfast::cuda::pack_bfloat16(in[i], -in[i]);
        float16[i] = ladderfast::cuda::pack_float16(in[i], -in[i]);
    }
}
void widen(float* out) {
    for (int i = 0; i < 65536; ++i) out[i] = ladderfast::cuda::float16_to_float(static_cast<uint16_t>(i));
}
void approximations(const float* in, float* power, float* reciprocal, int n) {
    for (int i = 0; i < n; ++i) {
        power[i] = ladderfast::cuda::exp2_approx(in[i]);
        reciprocal[i] = ladderfast::cuda::reciprocal_approx(in[i]);
    }
}
}
