#pragma once

#include <vector>

#include "plan/decode_plan.hpp"

namespace clusterfusion::plan {

// Where a tile's rows are those of two chunks: lanes of g < 4 take the first one's row.
inline std::vector<int> touched_in_pairs(const MatrixPlan& plan, int chunks) {
  std::vector<int> count(chunks * plan.columns, 0);
  for (int warp = 0; warp < kConsumerWarps; ++warp)
    for (int first = 0; first < chunks; first += 2)
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < plan.iterations; ++i)
          for (int element = 0; element < 8; ++element) {
            const int g = lane / 4, q = lane % 4;
            if (first + g / 4 >= chunks) continue;
            const std::int64_t column = warp * plan.segment_columns() +
                                        g % 4 * plan.slice_columns() + 32 * i + 8 * q + element;
            if (column < plan.columns) ++count.at((first + g / 4) * plan.columns + column);
          }
  return count;
}

// Counts how often the lanes of all warps touch each element of some chunks, as the kernel goes
// through them: the warps of a segment take its units round-robin, across chunks.
inline std::vector<int> touched(const MatrixPlan& plan, int chunks) {
  if (plan.mapping == MmaMapping::packed_pairs) return touched_in_pairs(plan, chunks);
  const std::int64_t chunk_elements = plan.rows_per_chunk * plan.columns;
  std::vector<int> count(chunks * chunk_elements, 0);
  for (int warp = 0; warp < kConsumerWarps; ++warp) {
    int turn = warp / plan.segments;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      for (; turn < plan.units_per_chunk(); turn += kConsumerWarps / plan.segments)
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < plan.iterations; ++i)
            for (int element = 0; element < 8; ++element) {
              const int g = lane / 4, q = lane % 4;
              const std::int64_t row = turn * plan.unit_rows + g / plan.slices();
              const std::int64_t column =
                  plan.lane_column(warp % plan.segments, g, q) + 32 * i + element;
              if (column < plan.columns)
                ++count.at(chunk * chunk_elements + row * plan.columns + column);
            }
      turn -= plan.units_per_chunk();
    }
  }
  return count;
}

}  // namespace clusterfusion::plan
