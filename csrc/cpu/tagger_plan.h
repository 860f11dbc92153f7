// How the CPU kernels for Tagger's pixels cut a shape: an item is some rows of one seed, and a block of their pixels.
#pragma once

#include "../tagger.h"

extern "C" double log(double);
extern "C" double sqrt(double);

namespace ladderfast::cpu {

struct TaggerPlan {
    int64_t rows;  // of a seed
    int64_t rows_per_item, chunks, blocks;

    static constexpr int64_t kBlock = 2048;     // pixels of an item, at most
    static constexpr int64_t kElements = 4096;  // elements of an item, where its rows are short

    explicit TaggerPlan(const TaggerShape& s) {
        rows = s.seeds > 0 ? s.rows / s.seeds : 0;
        const int64_t row = s.groups * (s.pixels < kBlock ? s.pixels : kBlock);
        rows_per_item = row > 0 && row < kElements ? kElements / row : 1;
        chunks = (rows + rows_per_item - 1) / rows_per_item;
        blocks = (s.pixels + kBlock - 1) / kBlock;
    }
};

}  // namespace ladderfast::cpu
