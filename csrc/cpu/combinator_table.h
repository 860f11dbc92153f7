// The ten parameters of the combinator as vectors. Textual header, included per instruction set inside its namespace,
// after vec.h.

#include "../math/combinator.h"

// Of the columns from `column` on; the rows of the table are `block` apart.
template <class T>
static LF_HD Combinator<Vec<T>> load_columns(const T* table, int64_t block, int64_t column) {
    Combinator<Vec<T>> p;
    for (int j = 0; j < 10; ++j) p.a[j] = Vec<T>::load(table + j * block + column);
    return p;
}

template <class T>
static LF_HD Combinator<Vec<T>> broadcast_channel(const T* params, int64_t channels, int64_t channel) {
    Combinator<Vec<T>> p;
    for (int j = 0; j < 10; ++j) p.a[j] = Vec<T>::broadcast(params[j * channels + channel]);
    return p;
}

// Of one channel, for the final sums.
template <class T>
static inline Combinator<double> load_channel(const T* params, int64_t channels, int64_t channel) {
    Combinator<double> p;
    for (int j = 0; j < 10; ++j) p.a[j] = params[j * channels + channel];
    return p;
}

// The gradients of one channel's parameters, from its finished sums.
template <class T>
static inline void finish_channel(double (&sums)[10], const Combinator<double>& p, T* grad_params, int64_t channels,
                                  int64_t channel) {
    combinator_finish(sums, p);
    for (int j = 0; j < 10; ++j) grad_params[j * channels + channel] = (T)sums[j];
}
