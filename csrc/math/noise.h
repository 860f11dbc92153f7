// Gaussian noise by counter: Philox4x32-10 (Salmon et al., 2011) and Box-Muller. Which counter and key an element has
// is written in ladderfast/reference/noise.py.
//
// Textual header without an include guard, like combinator.h. W is a 32-bit word or a vector of them with ^ and +, V a
// float or a vector of floats. Declared before: multiply_wide(W a, uint32_t m, W& high, W& low); uniform(W word) -> V,
// ((word >> 9) + 1/2) / 2^23, which is exact; log_(V) for 2^-24 <= x < 1; sqrt_(V); sincos_turn(V v, V& sin, V& cos),
// of 2 pi v for 0 < v < 1.

template <class W>
LF_HD void philox4x32(W (&c)[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        W high0, low0, high1, low1;
        multiply_wide(c[0], 0xD2511F53u, high0, low0);
        multiply_wide(c[2], 0xCD9E8D57u, high1, low1);
        c[0] = high1 ^ c[1] ^ key0;
        c[1] = low1;
        c[2] = high0 ^ c[3] ^ key1;
        c[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// The normal values of two neighbouring elements from their words.
template <class V, class W>
LF_HD void box_muller(W first, W second, V& normal0, V& normal1) {
    const V radius = sqrt_(log_(uniform(first)) * -2.0f);
    V sin, cos;
    sincos_turn(uniform(second), sin, cos);
    normal0 = radius * cos;
    normal1 = radius * sin;
}
