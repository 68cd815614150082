#include "plan/row_groups.hpp"

#include <algorithm>

namespace clusterfusion::plan {
namespace {

bool are_alike(const AttentionSplits& a, const AttentionSplits& b) {
  return a.blocks_per_split == b.blocks_per_split && a.splits == b.splits;
}

std::vector<RowGroup> groups_of(std::span<const AttentionRow> rows, const AttentionCut& cut,
                                std::int32_t task_queries) {
  std::vector<RowGroup> groups;
  std::int32_t sequence_first = 0;
  AttentionSplits before;  // of the row before
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(rows.size()); ++i) {
    const bool same_sequence = i > 0 && rows[i].sequence == rows[i - 1].sequence;
    if (!same_sequence) sequence_first = i;
    const AttentionSplits splits = cut.splits_of(rows[i].position);
    if (same_sequence && groups.back().rows < task_queries && are_alike(before, splits))
      ++groups.back().rows;
    else
      groups.push_back({i, 1, sequence_first});
    before = splits;
  }
  return groups;
}

// Of a layer.
std::int32_t num_tasks(std::span<const RowGroup> groups, std::span<const AttentionRow> rows,
                       const AttentionCut& cut) {
  std::int32_t tasks = 0;
  for (const RowGroup& group : groups)
    tasks += cut.num_heads * cut.splits_of(rows[group.first_row].position).splits;
  return tasks;
}

}  // namespace

RowGroups group_rows(std::span<const AttentionRow> rows, const AttentionCut& cut,
                     std::int32_t task_queries) {
  RowGroups result;
  std::int32_t tasks = 0;
  for (std::int32_t queries = kQuadQueries;; queries *= 2) {
    result.groups = groups_of(rows, cut, queries);
    tasks = num_tasks(result.groups, rows, cut);
    // Where no row has company there is nothing to choose.
    const bool has_company = result.groups.size() < rows.size();
    if (!has_company || queries >= task_queries || tasks <= cut.sm_count) break;
  }
  TaskExtent& extent = result.extent;
  for (const RowGroup& group : result.groups) {
    extent.queries = std::max(extent.queries, group.rows);
    const std::int32_t end = group.first_row + group.rows;
    extent.sequence_rows = std::max(extent.sequence_rows, end - group.sequence_first);
    extent.positions += rows[end - 1].position + 1;
  }
  extent.tasks = (tasks + cut.sm_count - 1) / cut.sm_count;
  return result;
}

}  // namespace clusterfusion::plan
