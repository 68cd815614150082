#include "plan/product_tiles.hpp"

namespace clusterfusion::plan {
namespace {

// A block's beginning and end take as long as so many chunks of weights.
constexpr std::int64_t kBlockCost = 2;

constexpr std::int64_t divide_up(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

}  // namespace

std::int32_t tile_chunks(std::span<const std::int32_t> matrix_chunks, std::int32_t row_blocks,
                         const TileLimits& limits, std::int32_t sm_count) {
  std::int32_t best = limits.most_chunks;
  std::int64_t least = 0;
  for (std::int32_t size = limits.most_chunks; size >= 1; --size) {
    std::int64_t blocks = 0;
    for (const std::int32_t chunks : matrix_chunks) blocks += divide_up(chunks, size) * row_blocks;
    const std::int64_t cost = divide_up(blocks, sm_count) * (size + limits.row_chunks + kBlockCost);
    if (size < limits.most_chunks && cost >= least) continue;
    best = size;
    least = cost;
  }
  return best;
}

}  // namespace clusterfusion::plan
