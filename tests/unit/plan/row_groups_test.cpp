// Which rows share their tasks of attention, on random steps: what must be so of every grouping,
// and that groups are as small as keeps every SM at one task.
#include "plan/row_groups.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace clusterfusion::plan {
namespace {

struct Step {
  AttentionCut cut;
  std::vector<AttentionRow> rows;
  std::int32_t task_queries = kQuadQueries;
};

// Up to 40 sequences of up to 16 rows each, at any positions.
Step random_step(std::mt19937& random) {
  static constexpr std::int32_t kHeads[] = {4, 8, 12, 16, 32, 40, 64, 131};
  static constexpr std::int32_t kHeadDims[] = {32, 64, 80, 96, 128, 256};
  static constexpr std::int32_t kSmCounts[] = {16, 78, 132, 148};
  static constexpr std::int32_t kBlockPositions[] = {16, 32, 64};
  static const char sequences[40] = {};
  const auto one_of = [&](const auto& values) { return values[random() % std::size(values)]; };
  Step step;
  step.cut = {one_of(kBlockPositions), one_of(kHeads), one_of(kHeadDims), one_of(kSmCounts)};
  step.task_queries = kQuadQueries << random() % 3;
  const std::size_t count = random() % 3 == 0 ? 1 : 1 + random() % std::size(sequences);
  for (std::size_t s = 0; s < count; ++s) {
    const std::uint32_t positions = random() % 2 == 0 ? 64 : 5000;
    const auto first = static_cast<std::int32_t>(random() % positions);
    const auto rows = static_cast<std::int32_t>(random() % 4 == 0 ? 1 : 1 + random() % 16);
    for (std::int32_t i = 0; i < rows; ++i) step.rows.push_back({&sequences[s], first + i});
  }
  return step;
}

bool are_cut_alike(const Step& step, std::int32_t row, std::int32_t other) {
  const AttentionSplits a = step.cut.splits_of(step.rows[row].position);
  const AttentionSplits b = step.cut.splits_of(step.rows[other].position);
  return a.splits == b.splits && a.blocks_per_split == b.blocks_per_split;
}
std::int32_t num_tasks(const Step& step, const std::vector<RowGroup>& groups) {
  std::int32_t tasks = 0;
  for (const RowGroup& group : groups)
    tasks += step.cut.num_heads *
             step.cut.splits_of(step.rows[group.first_row + group.rows - 1].position).splits;
  return tasks;
}

void expect_sound(const Step& step, const RowGroup& group, std::int32_t first_row) {
  ASSERT_EQ(group.first_row, first_row) << "every row is in one group";
  ASSERT_GE(group.rows, 1);
  ASSERT_LE(group.rows, step.task_queries);
  ASSERT_LE(group.sequence_first, group.first_row);
  const auto sequence = step.rows[group.sequence_first].sequence;
  if (group.sequence_first > 0) {
    ASSERT_NE(step.rows[group.sequence_first - 1].sequence, sequence);
  }
  for (std::int32_t row = group.sequence_first; row < group.first_row + group.rows; ++row)
    ASSERT_EQ(step.rows[row].sequence, sequence) << row;
  for (std::int32_t row = group.first_row; row < group.first_row + group.rows; ++row)
    ASSERT_TRUE(are_cut_alike(step, row, group.first_row)) << row;
}

TEST(RowGroups, HoldEachRowOnceWithRowsThatAreCutAlike) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; ++round) {
    const Step step = random_step(random);
    SCOPED_TRACE(testing::Message() << "round " << round);
    const RowGroups found = group_rows(step.rows, step.cut, step.task_queries);
    std::int32_t next = 0;
    for (const RowGroup& group : found.groups) {
      expect_sound(step, group, next);
      if (HasFatalFailure()) return;
      next += group.rows;
    }
    ASSERT_EQ(next, std::ssize(step.rows));
  }
}

TEST(RowGroups, SayWhatTheirTasksHaveAtMost) {
  std::mt19937 random(2);
  for (int round = 0; round < 2000; ++round) {
    const Step step = random_step(random);
    SCOPED_TRACE(testing::Message() << "round " << round);
    const auto [groups, extent] = group_rows(step.rows, step.cut, step.task_queries);
    std::int32_t queries = 0, sequence_rows = 0;
    std::int64_t positions = 0;
    for (const RowGroup& group : groups) {
      const std::int32_t end = group.first_row + group.rows;
      queries = std::max(queries, group.rows);
      sequence_rows = std::max(sequence_rows, end - group.sequence_first);
      positions += step.rows[end - 1].position + 1;
    }
    EXPECT_EQ(extent.queries, queries);
    EXPECT_EQ(extent.sequence_rows, sequence_rows);
    EXPECT_EQ(extent.positions, positions);
    const std::int32_t tasks = num_tasks(step, groups);
    EXPECT_GE(extent.tasks * step.cut.sm_count, tasks);
    EXPECT_LT((extent.tasks - 1) * step.cut.sm_count, tasks);
  }
}

// Four at a time is what all can have; more only where four would give an SM two tasks.
TEST(RowGroups, AreAsSmallAsKeepsEverySmAtOneTask) {
  std::mt19937 random(3);
  int large = 0, small = 0;
  for (int round = 0; round < 2000; ++round) {
    const Step step = random_step(random);
    SCOPED_TRACE(testing::Message() << "round " << round);
    const RowGroups found = group_rows(step.rows, step.cut, step.task_queries);
    const bool fits = num_tasks(step, found.groups) <= step.cut.sm_count;
    if (found.extent.queries > kQuadQueries) {
      ++large;
      std::int32_t taken = kQuadQueries;
      for (; taken < found.extent.queries; taken *= 2) {
        const RowGroups smaller = group_rows(step.rows, step.cut, taken);
        EXPECT_GT(num_tasks(step, smaller.groups), step.cut.sm_count) << taken;
        EXPECT_LT(found.groups.size(), smaller.groups.size()) << taken;
      }
      continue;
    }
    if (fits || step.task_queries == kQuadQueries) continue;
    // Not more, though an SM has two tasks: no two neighbours of a sequence are cut alike.
    ++small;
    for (std::size_t i = 1; i < found.groups.size(); ++i) {
      const RowGroup& before = found.groups[i - 1];
      const RowGroup& group = found.groups[i];
      const bool follows = before.sequence_first == group.sequence_first;
      EXPECT_FALSE(follows && are_cut_alike(step, before.first_row, group.first_row))
          << "groups " << i - 1 << " and " << i;
    }
  }
  EXPECT_GT(large, 100);
  EXPECT_GT(small, 10);
}

TEST(RowGroups, OfSequencesWithARowEachAreTheRows) {
  std::vector<char> sequences(256);
  std::vector<AttentionRow> rows;
  for (const char& sequence : sequences) rows.push_back({&sequence, 1000});
  const auto [groups, extent] = group_rows(rows, {64, 32, 80, 132}, 16);
  ASSERT_EQ(groups.size(), rows.size());
  for (std::int32_t i = 0; i < std::ssize(groups); ++i) {
    EXPECT_EQ(groups[i].first_row, i);
    EXPECT_EQ(groups[i].rows, 1);
    EXPECT_EQ(groups[i].sequence_first, i);
  }
  EXPECT_EQ(extent.queries, 1);
  EXPECT_EQ(extent.sequence_rows, 1);
}

}  // namespace
}  // namespace clusterfusion::plan
