// A bfloat16 in memory: the upper half of a float. Kernels widen it at the load and round once, to the nearest even, at
// the store.
#pragma once

#include <stdint.h>
#include <string.h>

namespace ladderfast {

struct BFloat16 {
    uint16_t bits;

    operator float() const {
        const uint32_t wide = (uint32_t)bits << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }
};

// What elements of S in memory are computed in.
template <class S>
struct WideOf {
    using Type = S;
};
template <>
struct WideOf<BFloat16> {
    using Type = float;
};
template <class S>
using Wide = typename WideOf<S>::Type;

}  // namespace ladderfast
