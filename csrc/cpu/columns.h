// Tables of one value for each column, and final sums over slots (plan.h), for plans with one part. Textual header,
// included per instruction set inside its namespace, after vec.h.

// The channels' values for columns [first, first + count) of a row, padded with 0 to whole vectors.
template <class T>
static inline void fill_row(T* row, const T* values, const PartsPlan& plan, int64_t first, int64_t count) {
    if (plan.inner == 1 && first + count <= plan.natural) {
        memcpy(row, values + first, count * sizeof(T));
    } else {
        for (int64_t i = 0; i < count; ++i) row[i] = values[(first + i) % plan.natural / plan.inner];
    }
    for (int64_t i = count; i % Vec<T>::width != 0; ++i) row[i] = 0;
}

// Sums over the slots, in their order and in double, for channels [first, first + count) of a seed, whose slots begin
// at `partial`. A slot has `kept` numbers for each column, of which the first `wanted` are summed.
template <class T>
static inline void sum_slots(double (*sums)[kChannelBlock], const T* partial, int64_t kept, int64_t wanted,
                             const PartsPlan& plan, int64_t first, int64_t count) {
    for (int64_t j = 0; j < wanted; ++j)
        for (int64_t c = 0; c < count; ++c) sums[j][c] = 0;
    if (plan.per_seed == 0) return;
    const int64_t width = plan.slot_width(), inner = plan.columns ? plan.inner : 1;
    for (int64_t slot = 0; slot < plan.slots(); ++slot) {
        for (int64_t j = 0; j < wanted; ++j) {
            const T* row = partial + (slot * kept + j) * width;
            for (int64_t copy = first * inner; copy < width; copy += plan.channels * inner) {
                if (inner == 1) {
                    for (int64_t c = 0; c < count; ++c) sums[j][c] += row[copy + c];
                } else {
                    for (int64_t c = 0; c < count; ++c)
                        for (int64_t k = 0; k < inner; ++k) sums[j][c] += row[copy + c * inner + k];
                }
            }
        }
    }
}
