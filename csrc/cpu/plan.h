// How the CPU kernels that normalise cut a shape into work items. The packed layout is (seeds, rows, channels, inner);
// the rows of a seed lie in parts with statistics of their own. Two ways through it:
//
//   columns  inner < kLongInner. A row is channels * inner columns; where that is less than 64, rows of a part are
//   taken
//            together until it is not and, where possible, a row has whole vectors. A vector covers neighbouring
//            columns, each with its own parameters; a part's last row may be short.
//   runs     otherwise. A vector runs along `inner` within one channel.
//
// Every part is cut into the same number of chunks of rows, some of which may have none, and items of different parts
// alternate: threads that take neighbouring items share dear and cheap parts evenly. Everything depends on the shape
// alone.
#pragma once

#include <stdint.h>

namespace ladderfast::cpu {

static const int64_t kMaxParts = 3;
static const int64_t kMaxBlock = 512;     // columns of one item: their parameters and sums fit the first-level cache
static const int64_t kMaxRows = 64;       // rows of one item
static const int64_t kMaxSegment = 8192;  // elements of a run that one item takes
static const int64_t kLongInner = 64;     // from here on by runs
static const int64_t kChannelBlock = 64;  // channels of one item of final sums

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct PartsPlan {
    int64_t seeds, channels, inner, parts;
    int64_t per_seed;                                     // elements of one seed
    int64_t part_begin[kMaxParts], part_size[kMaxParts];  // elements from the seed's beginning
    bool columns;
    int64_t natural;        // channels * inner
    int64_t width;          // columns: of a row, rows taken together; runs: channels * inner
    int64_t chunks;         // of each part
    int64_t block, blocks;  // columns: of one item, and how many a row has; runs: the same of a run's segments

    PartsPlan(int64_t seeds, int64_t rows, int64_t channels, int64_t inner, int64_t parts, const int64_t* part_rows,
              int64_t max_block = kMaxBlock)
        : seeds(seeds), channels(channels), inner(inner), parts(parts) {
        natural = width = channels * inner;
        per_seed = rows * natural;
        columns = inner < kLongInner;
        if (columns && natural > 0 && natural < 64) {
            int64_t together = 1;  // the fewest rows that make whole vectors of 16
            while (natural * together % 16 != 0) together *= 2;
            width = natural * together * ceil_div(64, natural * together);
        }
        int64_t most = 0, begin = 0;
        for (int64_t p = 0; p < kMaxParts; ++p) {
            part_begin[p] = begin;
            part_size[p] = p < parts ? part_rows[p] * natural : 0;
            begin += part_size[p];
            if (width > 0 && ceil_div(part_size[p], width) > most) most = ceil_div(part_size[p], width);
        }
        chunks = most > kMaxRows ? ceil_div(most, kMaxRows) : 2;
        const int64_t extent = columns ? width : inner, limit = columns ? max_block : kMaxSegment;
        blocks = ceil_div(extent, limit);
        block = blocks > 0 ? (ceil_div(extent, blocks) + 15) / 16 * 16 : 0;
        if (per_seed == 0) blocks = 0;
    }

    int64_t items() const { return seeds * chunks * blocks * parts * (columns ? 1 : channels); }
    int64_t rows(int64_t part) const { return width > 0 ? ceil_div(part_size[part], width) : 0; }
    int64_t full_rows(int64_t part) const { return width > 0 ? part_size[part] / width : 0; }

    // The rows of a chunk.
    int64_t row_begin(int64_t part, int64_t chunk) const { return rows(part) * chunk / chunks; }

    // Partial results: `slots` for each seed and part, each of so many values as a row of partial results is wide.
    int64_t slots() const { return chunks * (columns ? 1 : blocks); }
    int64_t slot_width() const { return columns ? width : channels; }
    int64_t slot(int64_t seed, int64_t part, int64_t index) const { return (seed * parts + part) * slots() + index; }

    // Items of passes over final results, for each seed and part, or for each seed.
    int64_t channel_blocks() const { return ceil_div(channels, kChannelBlock); }
};

// One item: rows [row, row_end) of a part; columns [first, first + count) of each, or elements of one channel's run.
struct PartsItem {
    int64_t seed, part, channel, slot, row, row_end, first, count;
    int64_t begin;   // where the part begins, in its seed
    int64_t offset;  // of the seed
    int64_t size;    // of the part

    PartsItem(const PartsPlan& plan, int64_t item) {
        part = item % plan.parts;
        item /= plan.parts;
        channel = 0;
        if (!plan.columns) {
            channel = item % plan.channels;
            item /= plan.channels;
        }
        const int64_t index = item % plan.blocks, chunk = item / plan.blocks % plan.chunks;
        seed = item / plan.blocks / plan.chunks;
        slot = plan.slot(seed, part, plan.columns ? chunk : chunk * plan.blocks + index);
        first = index * plan.block;
        count = min_of(plan.block, (plan.columns ? plan.width : plan.inner) - first);
        row = plan.row_begin(part, chunk);
        row_end = plan.row_begin(part, chunk + 1);
        begin = plan.part_begin[part];
        offset = seed * plan.per_seed;
        size = plan.part_size[part];
    }

    // Where the item's stretch of row r begins, in its seed.
    int64_t at(const PartsPlan& plan, int64_t r) const { return begin + r * plan.width + channel * plan.inner + first; }

    // Columns: how many of the item's columns row r has: all of them, but for a short last row.
    int64_t columns_of(const PartsPlan& plan, int64_t r) const {
        const int64_t left = size - r * plan.width - first;
        return left < 0 ? 0 : min_of(count, left);
    }
};

}  // namespace ladderfast::cpu
