// How matrices that many rows are multiplied by are cut into tiles, one for a block of threads.
#pragma once

#include <cstdint>
#include <span>

namespace clusterfusion::plan {

// What one block of threads can do.
struct TileLimits {
  std::int32_t most_chunks;
  std::int32_t row_chunks;  // rows that it multiplies by, 8 of them a chunk: they are read too
};

// Chunks of a tile so that the blocks of all matrices (of so many chunks each) for `row_blocks`
// blocks of rows are over soonest on `sm_count` multiprocessors.
std::int32_t tile_chunks(std::span<const std::int32_t> matrix_chunks, std::int32_t row_blocks,
                         const TileLimits& limits, std::int32_t sm_count);

}  // namespace clusterfusion::plan
