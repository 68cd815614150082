// What is gathered into one QKV matrix, against the place of each row as the kernels compute it.
#include "plan/qkv_rows.hpp"

#include <gtest/gtest.h>

#include <random>
#include <tuple>

namespace clusterfusion::plan {
namespace {

using Row = std::pair<LayerTensor, std::int64_t>;

std::vector<Row> gathered_rows(const LayerSpec& spec) {
  std::vector<Row> rows;
  for (const auto& [weight, first, count] : qkv_rows(spec)) {
    for (std::int64_t row = first; row < first + count; ++row) rows.emplace_back(weight, row);
  }
  return rows;
}

// Row `row` of QkvLayout::by_kv_head.
Row expected_row(const LayerSpec& spec, std::int64_t row) {
  const std::int64_t group = spec.heads_per_kv_head();
  const std::int64_t kv_head = row / ((group + 2) * spec.head_dim);
  const std::int64_t part = row / spec.head_dim % (group + 2);
  const std::int64_t dim = row % spec.head_dim;
  if (part < group)
    return {LayerTensor::query_weight, (kv_head * group + part) * spec.head_dim + dim};
  return {part == group ? LayerTensor::key_weight : LayerTensor::value_weight,
          kv_head * spec.head_dim + dim};
}

TEST(QkvRows, PutEachRowWhereTheKernelsReadIt) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    LayerSpec spec;
    spec.qkv_layout = QkvLayout::separate;
    const auto kv_heads = static_cast<std::int64_t>(1 + random() % 12);
    spec.num_heads = kv_heads * static_cast<std::int64_t>(1 + random() % 9);
    // Zero says: as many as there are queries.
    spec.num_kv_heads = kv_heads == spec.num_heads && random() % 2 == 0 ? 0 : kv_heads;
    spec.head_dim = static_cast<std::int64_t>(1 + random() % 130);
    SCOPED_TRACE(testing::Message()
                 << spec.num_heads << " heads over " << kv_heads << " of " << spec.head_dim);
    const std::vector<Row> rows = gathered_rows(spec);
    ASSERT_EQ(std::ssize(rows), spec.qkv_size());
    for (std::int64_t row = 0; row < spec.qkv_size(); ++row)
      ASSERT_EQ(rows[static_cast<std::size_t>(row)], expected_row(spec, row)) << row;
  }
}

TEST(QkvRows, LeaveOneMatrixAsItIs) {
  LayerSpec spec;
  spec.num_heads = 6;
  spec.num_kv_heads = 3;
  spec.head_dim = 16;
  const std::vector<MatrixRows> rows = qkv_rows(spec);
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_EQ(rows[0].weight, LayerTensor::qkv_weight);
  EXPECT_EQ(rows[0].first, 0);
  EXPECT_EQ(rows[0].count, spec.qkv_size());
}

}  // namespace
}  // namespace clusterfusion::plan
