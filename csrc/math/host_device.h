// LF_HD marks a function that is inlined into host and device code alike.
#pragma once

#if defined(__CUDACC__)
#define LF_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__) || defined(__clang__)
#define LF_HD inline __attribute__((always_inline))
#else
#define LF_HD inline
#endif
