// Overlap of strided tensors against the sets of their elements.
#include "ops/strided.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <random>
#include <set>

namespace clusterfusion::test {
namespace {

constexpr int kAxes = 4;

struct Strided {
  std::array<std::int64_t, kAxes> shape, strides;
  std::int64_t offset = 0;  // in bytes

  DLTensor view(std::byte* memory) {
    DLTensor tensor{};
    tensor.data = memory + offset;
    tensor.ndim = kAxes;
    tensor.dtype = {kDLFloat, 16, 1};
    tensor.shape = shape.data();
    tensor.strides = strides.data();
    return tensor;
  }

  // Of every element, both bytes; fewer if elements share some.
  std::multiset<std::int64_t> bytes() const {
    std::multiset<std::int64_t> all;
    std::array<std::int64_t, kAxes> at{};
    for (;;) {
      std::int64_t element = offset;
      for (int axis = 0; axis < kAxes; ++axis) element += 2 * at[axis] * strides[axis];
      all.insert(element);
      all.insert(element + 1);
      int axis = kAxes - 1;
      while (axis >= 0 && ++at[axis] == shape[axis]) at[axis--] = 0;
      if (axis < 0) return all;
    }
  }
};

bool meet(const Strided& a, const Strided& b) {
  const auto ours = a.bytes(), theirs = b.bytes();
  return std::any_of(ours.begin(), ours.end(), [&](std::int64_t x) { return theirs.contains(x); });
}

// The outer axes in any order, with gaps and without.
Strided random_strided(std::mt19937& random) {
  const auto upto = [&](int most) { return std::uniform_int_distribution<int>(1, most)(random); };
  Strided tensor{{upto(3), upto(3), upto(3), upto(4)}, {}, 0};
  std::array<int, kAxes - 1> order{0, 1, 2};
  std::shuffle(order.begin(), order.end(), random);
  tensor.strides[3] = 1;
  std::int64_t extent = tensor.shape[3];
  for (const int axis : order) {
    tensor.strides[static_cast<std::size_t>(axis)] = extent + upto(6) / 3 * upto(5);
    extent += (tensor.shape[static_cast<std::size_t>(axis)] - 1) *
              tensor.strides[static_cast<std::size_t>(axis)];
  }
  return tensor;
}

TEST(Strided, FindsEveryOverlap) {
  std::mt19937 random(3);
  std::array<std::byte, 4096> memory{};
  int overlaps = 0, between = 0;
  for (int round = 0; round < 20000; ++round) {
    Strided a = random_strided(random), b = a;
    const std::int64_t extent = ops::nested_extent(a.view(memory.data()));
    ASSERT_GT(extent, 0);
    EXPECT_EQ(*a.bytes().rbegin() + 1, 2 * extent);
    b.offset = std::uniform_int_distribution<std::int64_t>(0, 2 * extent)(random);
    const bool expected = meet(a, b);
    (expected ? overlaps : between) += 1;
    ASSERT_EQ(ops::nested_overlap(a.view(memory.data()), b.view(memory.data())), expected);
    ASSERT_EQ(ops::nested_overlap(b.view(memory.data()), a.view(memory.data())), expected);
  }
  EXPECT_GT(overlaps, 1000);
  EXPECT_GT(between, 1000);
}

TEST(Strided, RefusesWhatIsNotNested) {
  std::array<std::byte, 64> memory{};
  const auto extent = [&](std::array<std::int64_t, kAxes> strides) {
    Strided tensor{{2, 3, 2, 4}, strides, 0};
    return ops::nested_extent(tensor.view(memory.data()));
  };
  EXPECT_EQ(extent({24, 8, 4, 1}), 48);
  EXPECT_EQ(extent({4, 16, 8, 1}), 48);  // in another order
  EXPECT_EQ(extent({24, 8, 3, 1}), 0);   // rows run into each other
  EXPECT_EQ(extent({0, 8, 4, 1}), 0);
  EXPECT_EQ(extent({-24, 8, 4, 1}), 0);
  EXPECT_EQ(extent({48, 16, 8, 2}), 0);  // gaps in the last dimension
  EXPECT_EQ(extent({20, 8, 4, 1}), 0);
}

}  // namespace
}  // namespace clusterfusion::test
