// CPU kernels of the op `tagger`; contract in ../tagger.h, formulas in ../math/tagger.h.
//
// A vector, or a pair of them, covers neighbouring pixels of one row and goes over the groups two or three times, the
// first time from memory, then from the first-level cache. What is dear to compute (an exponential) is kept on the
// stack in between, for the first 64 groups.
//
// Floor: in float32 the inputs move 17 bytes for an element of z forward and 26 backward (x has a quarter of it), the
// costs 10 and 19. At 100 x 4 x 784 two AVX-512 cores take 33 and 52 us for Bernoulli inputs, 20 and 32 for Bernoulli
// costs, where loops over the same rows that only move as many bytes take 30, 44, 17 and 32: what limits them is the
// third-level cache, and in the backward pass of the inputs as much the two units that multiply (70 of 85 cycles for
// the 64 elements of a vector of pixels). Gaussian inputs take 41 and 69, costs 41 and 55: exponentials.
//
// Hence the Bernoulli passes are counted in instructions: places of elements are computed once for all tensors where
// these are packed (LF_BY_PLACE; the backward pass of the inputs 8 % faster), and what was read stays in registers.
// Prefetches cost more than they bring.
#undef LF_THIS_FILE
#define LF_THIS_FILE "tagger.cpp"

#include "../tagger.h"
#include "isa.h"
#include "tagger_plan.h"

#include "foreach_isa.h"

namespace ladderfast::cpu {
namespace LF_ISA {

#include "vec.h"
#include "elementary.h"
#include "../math/tagger.h"
#include "tagger_pass.h"

template <class T, int fixed>
struct GaussianInputs : TaggerPass<T> {
    T *dz, *likelihood;
    GaussianScalar<T> scalars;

    LF_HD GaussianInputs(const TaggerInputs& in, const TaggerShape& s, T* dz, T* likelihood)
        : TaggerPass<T>(in, s), dz(dz), likelihood(likelihood) {}
    LF_HD void start(int64_t seed) { scalars = gaussian_scalar<T>(this->scalar, seed); }

    template <class V, bool whole, bool scaled = false>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto v = broadcast<V>(scalars);
        const V x = this->x.template load<V, whole>(r, 0, d, n);
        V e[kept<fixed>], w[kept<fixed>];
        GaussianPixel<V, scaled> pixel;
        if constexpr (scaled) {
            GaussianPixel<V, false> unscaled;
            LF_EACH_GROUP(k, this->groups) {
                const V apart = x - this->z.template load<V, whole>(r, k, d, n);
                unscaled.weigh(apart, v);
                pixel.compare(apart);
            }
            pixel.unless_enough(unscaled.total);
        }
        LF_EACH_GROUP(k, this->groups) {
            const V apart = x - this->z.template load<V, whole>(r, k, d, n);
            const V weight = pixel.weigh(apart, v);
            if (fixed || k < kKept) {
                e[k] = apart;
                w[k] = weight;
            }
        }
        if constexpr (!scaled) {
            if (any_less(pixel.total, T(LF_TAGGER_ENOUGH), n)) {
                *this = scaled_pixels<V, whole>(*this, r, d, n);
                return;
            }
        }
        pixel.finish(v);
        LF_EACH_GROUP(k, this->groups) {
            const bool held = fixed || k < kKept;
            const V apart = held ? e[k] : x - this->z.template load<V, whole>(r, k, d, n);
            const V weight = held ? w[k] : pixel.weight(apart, v);
            V out_dz, out_likelihood;
            pixel.forward(apart, this->m.template load<V, whole>(r, k, d, n), weight, out_dz, out_likelihood);
            write<whole>(out_dz, dz + this->packed(r, k, d), n);
            write<whole>(out_likelihood, likelihood + this->packed(r, k, d), n);
        }
    }
};

template <class T, int fixed>
struct GaussianInputsBackward : TaggerPass<T> {
    TaggerView<T> grad_dz, grad_likelihood;
    T *grad_x, *grad_z, *grad_m;
    ItemSum<T> sum;
    GaussianScalar<T> scalars;

    LF_HD GaussianInputsBackward(const TaggerInput& grad_dz, const TaggerInput& grad_likelihood, const TaggerInputs& in,
                                 const TaggerShape& s, T* grad_x, T* grad_z, T* grad_m, double* partials)
        : TaggerPass<T>(in, s),
          grad_dz(grad_dz),
          grad_likelihood(grad_likelihood),
          grad_x(grad_x),
          grad_z(grad_z),
          grad_m(grad_m),
          sum(partials) {}
    LF_HD void start(int64_t seed) { scalars = gaussian_scalar<T>(this->scalar, seed); }
    LF_HD void end_row() { sum.end_row(); }
    LF_HD void end_item(int64_t item) { sum.end_item(item); }

    template <class V, bool whole, bool scaled = false>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto v = broadcast<V>(scalars);
        const V x = this->x.template load<V, whole>(r, 0, d, n);
        V e[kept<fixed>], w[kept<fixed>];
        GaussianPixel<V, scaled> pixel;
        if constexpr (scaled) {
            GaussianPixel<V, false> unscaled;
            LF_EACH_GROUP(k, this->groups) {
                const V apart = x - this->z.template load<V, whole>(r, k, d, n);
                unscaled.weigh(apart, v);
                pixel.compare(apart);
            }
            pixel.unless_enough(unscaled.total);
        }
        LF_EACH_GROUP(k, this->groups) {
            const V apart = x - this->z.template load<V, whole>(r, k, d, n);
            const V weight = pixel.weigh(apart, v, grad_likelihood.template load<V, whole>(r, k, d, n));
            if (fixed || k < kKept) {
                e[k] = apart;
                w[k] = weight;
            }
        }
        if constexpr (!scaled) {
            if (any_less(pixel.total, T(LF_TAGGER_ENOUGH), n)) {
                *this = scaled_pixels<V, whole>(*this, r, d, n);
                return;
            }
        }
        pixel.finish(v);
        V sum_v = constant<V>(0);
        LF_EACH_GROUP(k, this->groups) {
            const bool held = fixed || k < kKept;
            const V apart = held ? e[k] : x - this->z.template load<V, whole>(r, k, d, n);
            const V weight = held ? w[k] : pixel.weight(apart, v);
            V out_z, out_m;
            pixel.backward(grad_dz.template load<V, whole>(r, k, d, n),
                           grad_likelihood.template load<V, whole>(r, k, d, n), apart,
                           this->m.template load<V, whole>(r, k, d, n), weight, v, out_z, out_m, sum_v);
            write<whole>(out_z, grad_z + this->packed(r, k, d), n);
            write<whole>(out_m, grad_m + this->packed(r, k, d), n);
        }
        if (grad_x != nullptr) write<whole>(pixel.sum_x, grad_x + r * this->width + d, n);
        sum.template add<whole>(sum_v, n);
    }
};

template <class T, int fixed, bool dense>
struct BernoulliInputs : TaggerPass<T, dense> {
    static constexpr bool pairs = false;
    T *dz, *likelihood;
    BernoulliScalar<T> scalars;

    LF_HD BernoulliInputs(const TaggerInputs& in, const TaggerShape& s, T* dz, T* likelihood)
        : TaggerPass<T, dense>(in, s), dz(dz), likelihood(likelihood) {}
    LF_HD void start(int64_t seed) { scalars = bernoulli_scalar<T>(this->scalar, seed); }

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto b = broadcast<V>(scalars);
        BernoulliPixel<V> pixel(this->template load<V, whole>(this->x, r, d, n), b);
        V density[kept<fixed>];
        LF_EACH_GROUP(k, this->groups) {
            const V found = pixel.gather(this->template load<V, whole>(this->z, r, k, d, n),
                                         this->template load<V, whole>(this->m, r, k, d, n), b);
            if (fixed || k < kKept) density[k] = found;
        }
        pixel.finish();
        LF_EACH_GROUP(k, this->groups) {
            V out_dz, out_likelihood;
            pixel.forward(
                this->template load<V, whole>(this->m, r, k, d, n),
                fixed || k < kKept ? density[k] : pixel.density(this->template load<V, whole>(this->z, r, k, d, n)),
                out_dz, out_likelihood);
            write<whole>(out_dz, dz + this->packed(r, k, d), n);
            write<whole>(out_likelihood, likelihood + this->packed(r, k, d), n);
        }
    }
};

template <class T, int fixed, bool dense>
struct BernoulliInputsBackward : TaggerPass<T, dense> {
    static constexpr bool pairs = false;
    TaggerView<T> grad_dz, grad_likelihood;
    T *grad_x, *grad_z, *grad_m;
    BernoulliScalar<T> scalars;

    LF_HD BernoulliInputsBackward(const TaggerInput& grad_dz, const TaggerInput& grad_likelihood,
                                  const TaggerInputs& in, const TaggerShape& s, T* grad_x, T* grad_z, T* grad_m)
        : TaggerPass<T, dense>(in, s),
          grad_dz(grad_dz),
          grad_likelihood(grad_likelihood),
          grad_x(grad_x),
          grad_z(grad_z),
          grad_m(grad_m) {}
    LF_HD void start(int64_t seed) { scalars = bernoulli_scalar<T>(this->scalar, seed); }

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto b = broadcast<V>(scalars);
        BernoulliPixel<V> pixel(this->template load<V, whole>(this->x, r, d, n), b);
        // Kept where the groups are few: the compiler cannot know that what is written in between is none of it.
        struct Group {
            V z, m, grad_dz, grad_likelihood;
        } held[fixed ? fixed : 1];
        const auto group = [&](int64_t k) __attribute__((always_inline)) -> Group {
            return {this->template load<V, whole>(this->z, r, k, d, n),
                    this->template load<V, whole>(this->m, r, k, d, n),
                    this->template load<V, whole>(grad_dz, r, k, d, n),
                    this->template load<V, whole>(grad_likelihood, r, k, d, n)};
        };
        LF_EACH_GROUP(k, this->groups) {
            const Group g = group(k);
            pixel.gather(g.z, g.m, g.grad_dz, g.grad_likelihood, b);
            if (fixed) held[k] = g;
        }
        pixel.finish_backward();
        if (grad_x != nullptr) {
            V sum_x = pixel.grad_t;
            LF_EACH_GROUP(k, this->groups) {
                const Group g = fixed ? held[k] : group(k);
                sum_x = sum_x + pixel.grad_x(g.grad_likelihood, g.z, pixel.density(g.z), b);
            }
            write<whole>(sum_x, grad_x + r * this->width + d, n);
        }
        LF_EACH_GROUP(k, this->groups) {
            const Group g = fixed ? held[k] : group(k);
            V out_z, out_m;
            pixel.backward(g.grad_dz, g.grad_likelihood, g.z, g.m, pixel.density(g.z), b, out_z, out_m);
            write<whole>(out_z, grad_z + this->packed(r, k, d), n);
            write<whole>(out_m, grad_m + this->packed(r, k, d), n);
        }
    }
};

template <class T, int fixed>
struct GaussianNll : TaggerPass<T> {
    T* nll;
    GaussianScalar<T> scalars;

    LF_HD GaussianNll(const TaggerInputs& in, const TaggerShape& s, T* nll) : TaggerPass<T>(in, s), nll(nll) {}
    LF_HD void start(int64_t seed) { scalars = gaussian_scalar<T>(this->scalar, seed); }

    template <class V, bool whole, bool scaled = false>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto v = broadcast<V>(scalars);
        const V x = this->x.template load<V, whole>(r, 0, d, n);
        GaussianMixture<V, scaled> pixel;
        if constexpr (scaled) {
            GaussianMixture<V, false> unscaled;
            LF_EACH_GROUP(k, this->groups) {
                const V apart = x - this->z.template load<V, whole>(r, k, d, n);
                const V m = this->m.template load<V, whole>(r, k, d, n);
                unscaled.weigh(apart, m, v);
                pixel.compare(apart, m, v);
            }
            pixel.unless_enough(unscaled.total);
        }
        LF_EACH_GROUP(k, this->groups)
        pixel.weigh(x - this->z.template load<V, whole>(r, k, d, n), this->m.template load<V, whole>(r, k, d, n), v);
        if constexpr (!scaled) {
            if (any_less(pixel.total, T(LF_TAGGER_ENOUGH), n)) {
                *this = scaled_pixels<V, whole>(*this, r, d, n);
                return;
            }
        }
        write<whole>(pixel.nll(v), nll + r * this->width + d, n);
    }
};

template <class T, int fixed>
struct GaussianNllBackward : TaggerPass<T> {
    TaggerView<T> grad;
    T *grad_x, *grad_z, *grad_m;
    ItemSum<T> sum;
    GaussianScalar<T> scalars;

    LF_HD GaussianNllBackward(const TaggerInput& grad, const TaggerInputs& in, const TaggerShape& s, T* grad_x,
                              T* grad_z, T* grad_m, double* partials)
        : TaggerPass<T>(in, s), grad(grad), grad_x(grad_x), grad_z(grad_z), grad_m(grad_m), sum(partials) {}
    LF_HD void start(int64_t seed) { scalars = gaussian_scalar<T>(this->scalar, seed); }
    LF_HD void end_row() { sum.end_row(); }
    LF_HD void end_item(int64_t item) { sum.end_item(item); }

    template <class V, bool whole, bool scaled = false>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        const auto v = broadcast<V>(scalars);
        const V x = this->x.template load<V, whole>(r, 0, d, n);
        V e[kept<fixed>], w[kept<fixed>];
        GaussianMixture<V, scaled> pixel;
        if constexpr (scaled) {
            GaussianMixture<V, false> unscaled;
            LF_EACH_GROUP(k, this->groups) {
                const V apart = x - this->z.template load<V, whole>(r, k, d, n);
                const V m = this->m.template load<V, whole>(r, k, d, n);
                unscaled.weigh(apart, m, v);
                pixel.compare(apart, m, v);
            }
            pixel.unless_enough(unscaled.total);
        }
        LF_EACH_GROUP(k, this->groups) {
            const V apart = x - this->z.template load<V, whole>(r, k, d, n);
            const V weight = pixel.weigh(apart, this->m.template load<V, whole>(r, k, d, n), v);
            if (fixed || k < kKept) {
                e[k] = apart;
                w[k] = weight;
            }
        }
        if constexpr (!scaled) {
            if (any_less(pixel.total, T(LF_TAGGER_ENOUGH), n)) {
                *this = scaled_pixels<V, whole>(*this, r, d, n);
                return;
            }
        }
        V sum_v = grad.template load<V, whole>(r, 0, d, n);
        pixel.finish(sum_v);
        LF_EACH_GROUP(k, this->groups) {
            const bool held = fixed || k < kKept;
            const V apart = held ? e[k] : x - this->z.template load<V, whole>(r, k, d, n);
            const V weight = held ? w[k] : pixel.weight(apart, v);
            V out_z, out_m;
            pixel.backward(apart, this->m.template load<V, whole>(r, k, d, n), weight, v, out_z, out_m, sum_v);
            write<whole>(out_z, grad_z + this->packed(r, k, d), n);
            write<whole>(out_m, grad_m + this->packed(r, k, d), n);
        }
        if (grad_x != nullptr) write<whole>(pixel.sum_x, grad_x + r * this->width + d, n);
        sum.template add<whole>(sum_v, n);
    }
};

template <class T, int fixed, bool dense>
struct BernoulliNll : TaggerPass<T, dense> {
    T* nll;

    LF_HD BernoulliNll(const TaggerInputs& in, const TaggerShape& s, T* nll) : TaggerPass<T, dense>(in, s), nll(nll) {}

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        BernoulliMixture<V> pixel;
        LF_EACH_GROUP(k, this->groups)
        pixel.gather(this->template load<V, whole>(this->z, r, k, d, n),
                     this->template load<V, whole>(this->m, r, k, d, n));
        const V x = this->template load<V, whole>(this->x, r, d, n);
        write<whole>(all_binary(x, n) ? pixel.binary_nll(x) : pixel.nll(x), nll + r * this->width + d, n);
    }
};

template <class T, int fixed, bool dense>
struct BernoulliNllBackward : TaggerPass<T, dense> {
    TaggerView<T> grad;
    T *grad_x, *grad_z, *grad_m;

    LF_HD BernoulliNllBackward(const TaggerInput& grad, const TaggerInputs& in, const TaggerShape& s, T* grad_x,
                               T* grad_z, T* grad_m)
        : TaggerPass<T, dense>(in, s), grad(grad), grad_x(grad_x), grad_z(grad_z), grad_m(grad_m) {}

    template <class V, bool whole>
    LF_HD void pixels(int64_t r, int64_t d, int64_t n) {
        BernoulliMixture<V> pixel;
        // Kept where the groups are few: the compiler cannot know that what is written in between is none of it.
        struct Group {
            V z, m;
        } held[fixed ? fixed : 1];
        const auto group = [&](int64_t k) __attribute__((always_inline)) -> Group {
            return {this->template load<V, whole>(this->z, r, k, d, n),
                    this->template load<V, whole>(this->m, r, k, d, n)};
        };
        LF_EACH_GROUP(k, this->groups) {
            const Group g = group(k);
            pixel.gather(g.z, g.m);
            if (fixed) held[k] = g;
        }
        const V from = this->template load<V, whole>(grad, r, d, n);
        if (grad_x != nullptr) write<whole>(pixel.grad_x(from), grad_x + r * this->width + d, n);
        const V slope = pixel.backward(from, this->template load<V, whole>(this->x, r, d, n));
        LF_EACH_GROUP(k, this->groups) {
            const Group g = fixed ? held[k] : group(k);
            write<whole>(slope * g.m, grad_z + this->packed(r, k, d), n);
            write<whole>(slope * g.z, grad_m + this->packed(r, k, d), n);
        }
    }
};

#define LF_TAGGER_INSTANCES(T, suffix)                                                                             \
    static void inputs_##suffix(bool gaussian, const TaggerInputs& in, T* dz, T* likelihood, const TaggerShape& s, \
                                int64_t begin, int64_t end) {                                                      \
        if (gaussian)                                                                                              \
            LF_BY_GROUPS(T, GaussianInputs, in, s, dz, likelihood)                                                 \
        else                                                                                                       \
            LF_BY_PLACE(T, BernoulliInputs, packed(in, s), in, s, dz, likelihood)                                  \
    }                                                                                                              \
    static void inputs_backward_##suffix(bool gaussian, const TaggerInput& gd, const TaggerInput& gl,              \
                                         const TaggerInputs& in, T* gx, T* gz, T* gm, double* partials,            \
                                         const TaggerShape& s, int64_t begin, int64_t end) {                       \
        const bool dense = packed(in, s) && packed(gd, s) && packed(gl, s);                                        \
        if (gaussian)                                                                                              \
            LF_BY_GROUPS(T, GaussianInputsBackward, gd, gl, in, s, gx, gz, gm, partials)                           \
        else                                                                                                       \
            LF_BY_PLACE(T, BernoulliInputsBackward, dense, gd, gl, in, s, gx, gz, gm)                              \
    }                                                                                                              \
    static void nll_##suffix(bool gaussian, const TaggerInputs& in, T* nll, const TaggerShape& s, int64_t begin,   \
                             int64_t end) {                                                                        \
        if (gaussian)                                                                                              \
            LF_BY_GROUPS(T, GaussianNll, in, s, nll)                                                               \
        else                                                                                                       \
            LF_BY_PLACE(T, BernoulliNll, packed(in, s), in, s, nll)                                                \
    }                                                                                                              \
    static void nll_backward_##suffix(bool gaussian, const TaggerInput& g, const TaggerInputs& in, T* gx, T* gz,   \
                                      T* gm, double* partials, const TaggerShape& s, int64_t begin, int64_t end) { \
        const bool dense = packed(in, s) && packed_rows(g, s);                                                     \
        if (gaussian)                                                                                              \
            LF_BY_GROUPS(T, GaussianNllBackward, g, in, s, gx, gz, gm, partials)                                   \
        else                                                                                                       \
            LF_BY_PLACE(T, BernoulliNllBackward, dense, g, in, s, gx, gz, gm)                                      \
    }

LF_TAGGER_INSTANCES(float, f32)
LF_TAGGER_INSTANCES(double, f64)
#undef LF_TAGGER_INSTANCES

}  // namespace LF_ISA
}  // namespace ladderfast::cpu

#if LF_DISPATCH
namespace ladderfast::cpu {

int64_t tagger_items(const TaggerShape& s) {
    const TaggerPlan plan(s);
    return s.groups > 0 ? s.seeds * plan.chunks * plan.blocks : 0;
}

#define LF_TAGGER_DISPATCH(T, suffix)                                                                             \
    template <>                                                                                                   \
    void tagger_inputs<T>(bool gaussian, const TaggerInputs& in, T* dz, T* likelihood, const TaggerShape& s,      \
                          int64_t begin, int64_t end) {                                                           \
        static const auto kernel = LF_SELECT(inputs_##suffix);                                                    \
        kernel(gaussian, in, dz, likelihood, s, begin, end);                                                      \
    }                                                                                                             \
    template <>                                                                                                   \
    void tagger_inputs_backward<T>(bool gaussian, const TaggerInput& gd, const TaggerInput& gl,                   \
                                   const TaggerInputs& in, T* gx, T* gz, T* gm, double* partials,                 \
                                   const TaggerShape& s, int64_t begin, int64_t end) {                            \
        static const auto kernel = LF_SELECT(inputs_backward_##suffix);                                           \
        kernel(gaussian, gd, gl, in, gx, gz, gm, partials, s, begin, end);                                        \
    }                                                                                                             \
    template <>                                                                                                   \
    void tagger_nll<T>(bool gaussian, const TaggerInputs& in, T* nll, const TaggerShape& s, int64_t begin,        \
                       int64_t end) {                                                                             \
        static const auto kernel = LF_SELECT(nll_##suffix);                                                       \
        kernel(gaussian, in, nll, s, begin, end);                                                                 \
    }                                                                                                             \
    template <>                                                                                                   \
    void tagger_nll_backward<T>(bool gaussian, const TaggerInput& g, const TaggerInputs& in, T* gx, T* gz, T* gm, \
                                double* partials, const TaggerShape& s, int64_t begin, int64_t end) {             \
        static const auto kernel = LF_SELECT(nll_backward_##suffix);                                              \
        kernel(gaussian, g, in, gx, gz, gm, partials, s, begin, end);                                             \
    }                                                                                                             \
    template <>                                                                                                   \
    void tagger_sum<T>(const double* partials, const T* variance, T* grad_variance, const TaggerShape& s) {       \
        const int64_t items = s.seeds > 0 ? tagger_items(s) / s.seeds : 0;                                        \
        for (int64_t seed = 0; seed < s.seeds; ++seed) {                                                          \
            double total = 0;                                                                                     \
            for (int64_t i = 0; i < items; ++i) total += partials[seed * items + i];                              \
            grad_variance[seed] = (T)(total / (2.0 * variance[seed]));                                            \
        }                                                                                                         \
    }

LF_TAGGER_DISPATCH(float, f32)
LF_TAGGER_DISPATCH(double, f64)
#undef LF_TAGGER_DISPATCH

}  // namespace ladderfast::cpu
#endif
