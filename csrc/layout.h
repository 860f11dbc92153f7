// Contract of the op `lay_out` between ops.cpp and its kernel. No dependency on torch.
//
// A batch of matrices (rows, columns), each packed row by row, is written transposed: images (C, H W) become
// channels-last, or such as are come back. `to` never aliases `from`.
#pragma once

#include <stdint.h>

struct LayoutShape {
    int64_t batch, rows, columns;
    int64_t from_stride, to_stride;  // elements from a matrix to the next
};

// Work items as in the other contracts: any order, number and extent by the shape alone.
namespace ladderfast::cpu {

int64_t transpose_items(const LayoutShape& shape);

void transpose(const float* from, float* to, const LayoutShape& shape, int64_t begin, int64_t end);

}  // namespace ladderfast::cpu
