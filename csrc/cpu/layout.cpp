// CPU kernel of the op `lay_out`; contract in ../layout.h.
//
// Floor: a number read and one written. Tiles of 16 x 16 make whole lines on both sides; those written lie far apart,
// so that from memory reading them first would cost as much again: they go past the caches.
#undef LF_THIS_FILE
#define LF_THIS_FILE "layout.cpp"

#ifndef LADDERFAST_CPU_LAYOUT_PLAN
#define LADDERFAST_CPU_LAYOUT_PLAN

#include "../layout.h"
#include "isa.h"
#include "plan.h"

namespace ladderfast::cpu {

static const int64_t kTile = 16;
static const int64_t kExtent = 256;  // rows and columns of an item

// How a shape is cut; compiled once, before any instruction set is chosen.
struct LayoutPlan {
    int64_t down, across;  // items of a matrix

    explicit LayoutPlan(const LayoutShape& s) : down(ceil_div(s.rows, kExtent)), across(ceil_div(s.columns, kExtent)) {}
};

}  // namespace ladderfast::cpu

#endif

#include "foreach_isa.h"

namespace ladderfast::cpu {
namespace LF_ISA {

#include "vec.h"

static LF_HD void whole_tile(const float* from, int64_t columns, float* to, int64_t rows, int64_t ahead, bool stream) {
    using V = Vec<float>;
    alignas(64) float tile[kTile][kTile];
    for (int64_t i = 0; i < kTile; ++i) {
        __builtin_prefetch(from + i * columns + ahead);
        for (int64_t j = 0; j < kTile; ++j) tile[j][i] = from[i * columns + j];
    }
    for (int64_t j = 0; j < kTile; ++j) {
        for (int64_t i = 0; i < kTile; i += V::width) {
            const V x = V::load(tile[j] + i);
            if (stream)
                x.stream(to + j * rows + i);
            else
                x.store(to + j * rows + i);
        }
    }
}

static void transpose(const float* from, float* to, const LayoutShape& s, int64_t begin, int64_t end) {
    const LayoutPlan plan(s);
    const bool stream = s.rows % kTile == 0 && s.to_stride % kTile == 0 && (uintptr_t)to % 64 == 0;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t column = item % plan.across * kExtent, row = item / plan.across % plan.down * kExtent;
        const int64_t matrix = item / plan.across / plan.down;
        const int64_t column_end = min_of(column + kExtent, s.columns), row_end = min_of(row + kExtent, s.rows);
        const float* source = from + matrix * s.from_stride;
        float* target = to + matrix * s.to_stride;
        // Along the longer side last, so that what is read lies as near together as can be.
        const bool along_columns = s.columns >= s.rows;
        const int64_t ahead = along_columns ? 4 * kTile : kTile * s.columns;
        const int64_t down = ceil_div(row_end - row, kTile), across = ceil_div(column_end - column, kTile);
        for (int64_t tile = 0; tile < down * across; ++tile) {
            const int64_t r = row + (along_columns ? tile % down : tile / across) * kTile;
            const int64_t c = column + (along_columns ? tile / down : tile % across) * kTile;
            if (r + kTile <= row_end && c + kTile <= column_end) {
                whole_tile(source + r * s.columns + c, s.columns, target + c * s.rows + r, s.rows, ahead, stream);
                continue;
            }
            for (int64_t j = c; j < min_of(c + kTile, column_end); ++j)
                for (int64_t i = r; i < min_of(r + kTile, row_end); ++i)
                    target[j * s.rows + i] = source[i * s.columns + j];
        }
    }
    if (stream) order_streams();
}

}  // namespace LF_ISA
}  // namespace ladderfast::cpu

#if LF_DISPATCH
namespace ladderfast::cpu {

int64_t transpose_items(const LayoutShape& s) {
    const LayoutPlan plan(s);
    return s.batch * plan.down * plan.across;
}

void transpose(const float* from, float* to, const LayoutShape& s, int64_t begin, int64_t end) {
    static const auto kernel = LF_SELECT(transpose);
    kernel(from, to, s, begin, end);
}

}  // namespace ladderfast::cpu
#endif
