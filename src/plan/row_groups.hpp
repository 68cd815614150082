// Which rows of a decode step share their tasks of attention.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "plan/stream_plan.hpp"

namespace clusterfusion::plan {

// A row as attention sees it.
struct AttentionRow {
  const void* sequence = nullptr;  // the same for rows of one sequence
  std::int32_t position = 0;
};

// Rows of one sequence, at consecutive positions, that share their tasks of attention.
struct RowGroup {
  std::int32_t first_row;
  std::int32_t rows;
  std::int32_t sequence_first;  // first row of the step that is of the same sequence
};

// How attention is cut (attention_splits()).
struct AttentionCut {
  std::int32_t block_positions = 0, num_heads = 0, head_dim = 0, sm_count = 0;
  AttentionSplits splits_of(std::int32_t position) const noexcept {
    return attention_splits(position + 1, block_positions, num_heads, head_dim, sm_count);
  }
};

struct RowGroups {
  std::vector<RowGroup> groups;  // in order of rows
  TaskExtent extent;
};

// Groups rows, of which those of one sequence lie side by side at consecutive positions. Rows of a
// group have the same splits, and are at most `task_queries`: kQuadQueries times a power of two.
// Up to kQuadQueries rows share always, since one product takes them; twice and four times as many
// only while an SM would have two tasks: many read keys and values less often, few keep more SMs
// busy.
RowGroups group_rows(std::span<const AttentionRow> rows, const AttentionCut& cut,
                     std::int32_t task_queries);

}  // namespace clusterfusion::plan
