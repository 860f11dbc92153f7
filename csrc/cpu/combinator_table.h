// The parameters of the combinator as vectors. Textual header, included per instruction set inside its namespace,
// after vec.h.

#include "../math/combinator.h"

static const int kCombinatorRows = 14;  // of a table of columns: the ten parameters, then Combinator::arguments

// Rows 10 .. 13 of a table, from its first ten; rows are `block` apart and have whole vectors of `count` columns.
template <class T>
static inline void fill_arguments(T* table, int64_t block, int64_t count) {
    for (int k = 0; k < 4; ++k) {
        const T* from = table + combinator_argument(k) * block;
        T* to = table + (10 + k) * block;
        for (int64_t c = 0; c < count; c += Vec<T>::width) sigmoid_argument(Vec<T>::load(from + c)).store(to + c);
    }
}

// Of the columns from `column` on.
template <class T>
static LF_HD Combinator<Vec<T>> load_columns(const T* table, int64_t block, int64_t column) {
    Combinator<Vec<T>> p;
    for (int j = 0; j < 10; ++j) p.a[j] = Vec<T>::load(table + j * block + column);
    for (int k = 0; k < 4; ++k) p.arguments[k] = Vec<T>::load(table + (10 + k) * block + column);
    return p;
}

template <class T>
static LF_HD Combinator<Vec<T>> broadcast_channel(const T* params, int64_t channels, int64_t channel) {
    Combinator<Vec<T>> p;
    for (int j = 0; j < 10; ++j) p.a[j] = Vec<T>::broadcast(params[j * channels + channel]);
    for (int k = 0; k < 4; ++k) p.arguments[k] = sigmoid_argument(p.a[combinator_argument(k)]);
    return p;
}

// Of one channel, for the final sums.
template <class T>
static inline Combinator<double> load_channel(const T* params, int64_t channels, int64_t channel) {
    Combinator<double> p;
    for (int j = 0; j < 10; ++j) p.a[j] = params[j * channels + channel];
    for (int k = 0; k < 4; ++k) p.arguments[k] = sigmoid_argument(p.a[combinator_argument(k)]);
    return p;
}

// The gradients of one channel's parameters, from its finished sums.
template <class T>
static inline void finish_channel(double (&sums)[10], const Combinator<double>& p, T* grad_params, int64_t channels,
                                  int64_t channel) {
    combinator_finish(sums, p);
    for (int j = 0; j < 10; ++j) grad_params[j * channels + channel] = (T)sums[j];
}
