#include "backend/cuda/stream/row_tables.hpp"

#include <algorithm>
#include <cstddef>

#include "backend/cuda/check.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cuda {
namespace {

plan::AttentionSplits splits_of(const DecodeRow& row, const StreamParams& params,
                                std::int32_t sm_count) {
  return plan::attention_splits(static_cast<std::int32_t>(row.position + 1),
                                params.kv_block_positions, params.num_heads, params.head_dim,
                                sm_count);
}

// Rows of one sequence share their attention at consecutive positions with the same splits, up to
// `task_queries` of them.
std::vector<RowGroup> groups_of(std::span<const DecodeRow> rows, const StreamParams& params,
                                std::int32_t sm_count, std::int32_t task_queries) {
  std::vector<RowGroup> groups;
  std::int32_t sequence_first = 0;
  plan::AttentionSplits before;  // of the row before
  for (std::int32_t i = 0; i < static_cast<std::int32_t>(rows.size()); ++i) {
    const bool same_sequence = i > 0 && rows[i].pages.data() == rows[i - 1].pages.data();
    if (!same_sequence) sequence_first = i;
    const auto splits = splits_of(rows[i], params, sm_count);
    const bool shares = same_sequence && groups.back().rows < task_queries &&
                        before.blocks_per_split == splits.blocks_per_split &&
                        before.splits == splits.splits;
    before = splits;
    if (shares)
      ++groups.back().rows;
    else
      groups.push_back({i, 1, sequence_first});
  }
  return groups;
}

// Of attention, in a layer.
std::int32_t num_tasks(std::span<const RowGroup> groups, std::span<const DecodeRow> rows,
                       const StreamParams& params, std::int32_t sm_count) {
  std::int32_t tasks = 0;
  for (const RowGroup& group : groups)
    tasks += params.num_heads *
             splits_of(rows[group.first_row + group.rows - 1], params, sm_count).splits;
  return tasks;
}

}  // namespace

RowTables::RowTables(const Extent& most)
    : most_(most),
      groups_(most.rows * static_cast<std::int64_t>(sizeof(StreamedRow))),
      pages_(groups_ + most.rows * static_cast<std::int64_t>(sizeof(RowGroup) + 4)),
      bytes_(pages_ + most.rows * most.pages * static_cast<std::int64_t>(sizeof(char*))),
      device_(most.tables * bytes_, "tables of rows"),
      host_(most.tables * bytes_, "tables of rows") {}

plan::TaskExtent RowTables::send(std::span<const DecodeRow> rows, std::int32_t index,
                                 std::int32_t sm_count, StreamParams& params, cudaStream_t stream) {
  require(index < most_.tables && std::ssize(rows) <= most_.rows, ErrorKind::internal,
          "rows: expected at most {} of them and {} tables, found {} rows for table {}", most_.rows,
          most_.tables, rows.size(), index);
  char* host = host_.as<>() + index * bytes_;
  char* device = device_.as<>() + index * bytes_;
  fill(rows, host, device);
  // Many queries a task read keys and values less often; few keep more SMs busy. Where no row has
  // company there is nothing to choose.
  std::int32_t task_queries = plan::kQuadQueries;
  auto groups = groups_of(rows, params, sm_count, task_queries);
  while (groups.size() < rows.size() && task_queries < most_.task_queries &&
         num_tasks(groups, rows, params, sm_count) > sm_count) {
    task_queries *= 2;
    groups = groups_of(rows, params, sm_count, task_queries);
  }
  std::copy(groups.begin(), groups.end(), reinterpret_cast<RowGroup*>(host + groups_));
  const std::int64_t bytes =
      pages_ + static_cast<std::int64_t>(rows.size()) * most_.pages * std::int64_t{sizeof(char*)};
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream), "sending rows");
  params.rows = static_cast<std::int32_t>(rows.size());
  params.rows_reciprocal = 65536 / params.rows + 1;
  params.groups = static_cast<std::int32_t>(groups.size());
  params.row_table = reinterpret_cast<const StreamedRow*>(device);
  params.group_table = reinterpret_cast<const RowGroup*>(device + groups_);
  plan::TaskExtent extent;
  for (const RowGroup& group : groups) {
    extent.queries = std::max(extent.queries, group.rows);
    const std::int32_t end = group.first_row + group.rows;
    extent.sequence_rows = std::max(extent.sequence_rows, end - group.sequence_first);
    extent.positions += rows[end - 1].position + 1;
  }
  extent.tasks = (num_tasks(groups, rows, params, sm_count) + sm_count - 1) / sm_count;
  return extent;
}

void RowTables::fill(std::span<const DecodeRow> rows, char* host, const char* device) {
  auto* row_table = reinterpret_cast<StreamedRow*>(host);
  auto* pages = reinterpret_cast<char**>(host + pages_);
  const auto* device_pages = reinterpret_cast<char* const*>(device + pages_);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int64_t first = static_cast<std::int64_t>(i) * most_.pages;
    row_table[i] = {.position = static_cast<std::int32_t>(rows[i].position),
                    .token = rows[i].input,
                    .temperature = rows[i].temperature,
                    .drawable_vocab_size = rows[i].drawable_vocab_size,
                    .seed = rows[i].seed,
                    .kv_pages = device_pages + first};
    std::copy(rows[i].pages.begin(), rows[i].pages.end(), pages + first);
  }
}

TokenId* RowTables::input(std::int32_t index, std::size_t row) const noexcept {
  char* of_row = device_.as<>() + index * bytes_ + row * sizeof(StreamedRow);
  return reinterpret_cast<TokenId*>(of_row + offsetof(StreamedRow, token));
}

}  // namespace clusterfusion::cuda
