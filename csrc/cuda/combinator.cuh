// The combinator's formulas in both grades, and a channel's parameters.
#pragma once

#include "../math/host_device.h"
#include "elements.cuh"
#include "math.cuh"

#include <type_traits>

namespace ladderfast::cuda::coarse {
#include "../math/combinator.h"
}
namespace ladderfast::cuda::precise {
#include "../math/combinator.h"
}

namespace ladderfast::cuda {

using coarse::combinator_backward;
using coarse::combinator_finish;
using coarse::combinator_forward;
using precise::combinator_argument;
using precise::combinator_backward;
using precise::combinator_finish;
using precise::combinator_forward;
using precise::sigmoid_argument;

constexpr int kCombinatorParams = 10;

// A channel's parameters; their type decides which of the two grades computes.
template <class T>
using Params = std::conditional_t<sizeof(T) == 2, coarse::Combinator<float>, precise::Combinator<Compute<T>>>;

template <class T>
__device__ __forceinline__ Params<T> load_combinator(const void* params, bool float_params, int64_t seed,
                                                     int64_t channels, int64_t channel) {
    Params<T> p;
#pragma unroll
    for (int k = 0; k < kCombinatorParams; ++k)
        p.a[k] = load_either<T>(params, float_params, (seed * kCombinatorParams + k) * channels + channel);
#pragma unroll
    for (int k = 0; k < 4; ++k) p.arguments[k] = sigmoid_argument(p.a[combinator_argument(k)]);
    return p;
}

}  // namespace ladderfast::cuda
