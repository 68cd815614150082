#include "backend/cuda/stream/row_tables.hpp"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "backend/cuda/check.hpp"
#include "base/fail.hpp"
#include "plan/row_groups.hpp"

namespace clusterfusion::cuda {
namespace {

// As StreamParams::rows_reciprocal says.
constexpr std::int32_t reciprocal_of(std::int32_t rows) { return 65536 / rows + 1; }

constexpr bool divides_exactly(std::int32_t rows) {
  for (std::int32_t n = 0; n < 256; ++n)
    if (n * reciprocal_of(rows) >> 16 != n / rows) return false;
  return true;
}
constexpr bool all_divide_exactly() {
  for (std::int32_t rows = 1; rows <= plan::kMaxRows; ++rows)
    if (!divides_exactly(rows)) return false;
  return true;
}
static_assert(all_divide_exactly());

}  // namespace

RowTables::RowTables(const Extent& most)
    : most_(most),
      groups_(most.rows * static_cast<std::int64_t>(sizeof(StreamedRow))),
      pages_(groups_ + most.rows * static_cast<std::int64_t>(sizeof(plan::RowGroup) + 4)),
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
  std::vector<plan::AttentionRow> attention_rows;
  attention_rows.reserve(rows.size());
  for (const DecodeRow& row : rows)
    attention_rows.push_back({row.pages.data(), static_cast<std::int32_t>(row.position)});
  const auto [groups, extent] = plan::group_rows(
      attention_rows, {params.kv_block_positions, params.num_heads, params.head_dim, sm_count},
      most_.task_queries);
  std::copy(groups.begin(), groups.end(), reinterpret_cast<plan::RowGroup*>(host + groups_));
  const std::int64_t bytes =
      pages_ + static_cast<std::int64_t>(rows.size()) * most_.pages * std::int64_t{sizeof(char*)};
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream), "sending rows");
  params.rows = static_cast<std::int32_t>(rows.size());
  params.rows_reciprocal = reciprocal_of(params.rows);
  params.groups = static_cast<std::int32_t>(groups.size());
  params.row_table = reinterpret_cast<const StreamedRow*>(device);
  params.group_table = reinterpret_cast<const plan::RowGroup*>(device + groups_);
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
