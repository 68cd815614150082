// How matrices that many rows are multiplied by are cut into tiles, one for a block of threads.
#pragma once

#include <cstdint>
#include <span>

namespace clusterfusion::plan {

// Chunks of a tile, at most `most`, so that the blocks of all matrices (of so many chunks each) for
// `row_blocks` blocks of rows are over soonest on `sm_count` multiprocessors.
std::int32_t tile_chunks(std::span<const std::int32_t> matrix_chunks, std::int32_t row_blocks,
                         std::int32_t most, std::int32_t sm_count);

}  // namespace clusterfusion::plan
