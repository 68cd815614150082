// Causal attention over KV pages, and how keys and values are put there.
//
// A query meets the pages in order and keeps a running maximum, sum and output (online softmax), so
// its result depends on its own position alone, not on the queries beside it. Positions lie along
// the vector when scores are made, values of a head when the output is: no sum crosses lanes there.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "backend/cpu/attention.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h:
#include <algorithm>
#include <limits>

#include "backend/backend.hpp"
#include "backend/cpu/math-inl.h"
#include "backend/cpu/vector16-inl.h"

HWY_BEFORE_NAMESPACE();
namespace clusterfusion::cpu {
namespace HWY_NAMESPACE {

// Columns of 16 that stay in registers beside kQueryBlock queries.
constexpr int kColumns = kParts == 1 ? 4 : kParts == 2 ? 1 : 1;
constexpr std::int64_t kPage = kKvPagePositions;
static_assert(kPage % (kColumns * kLanes) == 0);

// A block of up to kQueryBlock queries of one head and what they have gathered so far.
struct QueryBlock {
  std::int64_t count;
  std::int64_t first_position;
  float largest[kQueryBlock];  // score so far
  float sum[kQueryBlock];      // of e^(score - largest)
  float rescale[kQueryBlock];  // of earlier output, for a new largest score
  float* scores;               // [kQueryBlock][kPage], then e^(score - largest)
  float* out;                  // [kQueryBlock][padded_dim]
};

// Positions of the page from `page_start` on that query `q` may see.
HWY_INLINE std::int64_t visible(const QueryBlock& block, std::int64_t q, std::int64_t page_start) {
  return std::clamp<std::int64_t>(block.first_position + q - page_start + 1, 0, kPage);
}

// scores[q][position] = scale * (query[q] . key[position])
template <int kQueries, typename T>
HWY_INLINE void page_scores(const AttentionTask& task, const float* query, const T* keys,
                            float* scores) {
  for (std::int64_t column = 0; column < kPage; column += kColumns * kLanes) {
    Vector16 acc[kQueries * kColumns];
    CF_UNROLL
    for (int i = 0; i < kQueries * kColumns; ++i) acc[i] = set16(0.0f);
    for (std::int64_t k = 0; k < task.layout.head_dim; ++k) {
      const T* from = keys + k * kPage + column;
      Vector16 key[kColumns];
      CF_UNROLL
      for (int c = 0; c < kColumns; ++c) key[c] = load16(from + c * kLanes);
      CF_UNROLL
      for (int q = 0; q < kQueries; ++q) {
        const Vector16 value = set16(query[q * task.query_stride + k]);
        CF_UNROLL
        for (int c = 0; c < kColumns; ++c) {
          acc[q * kColumns + c] = mul_add16(value, key[c], acc[q * kColumns + c]);
        }
      }
    }
    const Vector16 scale = set16(task.scale);
    CF_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      CF_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        store16(mul16(acc[q * kColumns + c], scale), scores + q * kPage + column + c * kLanes);
      }
    }
  }
}

// Turns a page's scores into weights and moves the running maximum and sum of query `q`.
HWY_INLINE void update_softmax(QueryBlock& block, std::int64_t q, std::int64_t page_start) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  constexpr int kVectors = static_cast<int>(kPage / kLanes);
  const std::int64_t count = visible(block, q, page_start);
  float* scores = block.scores + q * kPage;
  Vector16 score[kVectors];
  Vector16 largest = set16(block.largest[q]);
  for (int i = 0; i < kVectors; ++i) {
    score[i] = first_lanes16(count - i * kLanes, load16(scores + i * kLanes), kNone);
    largest = max16(largest, score[i]);
  }
  const float new_largest = largest16(largest);
  const Vector16 offset = set16(new_largest);
  Vector16 sum = set16(0.0f);
  for (int i = 0; i < kVectors; ++i) {
    const Vector16 weight = make16(
        [&](int part) HWY_ATTR { return exp_of(hn::Sub(score[i].part[part], offset.part[part])); });
    store16(weight, scores + i * kLanes);
    sum = add16(sum, weight);
  }
  const float rescale = hn::GetLane(exp_of(hn::Set(FloatTag(), block.largest[q] - new_largest)));
  block.sum[q] = block.sum[q] * rescale + sum16(sum);
  block.rescale[q] = rescale;
  block.largest[q] = new_largest;
}

// out[q] = out[q] * rescale[q] + sum over visible positions of weight * value, for kWidth columns
// of 16 from `column` on. Positions that only some queries see are left to those.
template <int kQueries, int kWidth, typename T>
HWY_INLINE void page_output_columns(QueryBlock& block, std::int64_t padded_dim, const T* values,
                                    std::int64_t page_start, std::int64_t column) {
  Vector16 acc[kQueries * kWidth];
  CF_UNROLL
  for (int q = 0; q < kQueries; ++q) {
    const Vector16 rescale = set16(block.rescale[q]);
    CF_UNROLL
    for (int c = 0; c < kWidth; ++c) {
      acc[q * kWidth + c] =
          mul16(load16(block.out + q * padded_dim + column + c * kLanes), rescale);
    }
  }
  const std::int64_t common = visible(block, 0, page_start);
  for (std::int64_t position = 0; position < common; ++position) {
    const T* from = values + position * padded_dim + column;
    Vector16 value[kWidth];
    CF_UNROLL
    for (int c = 0; c < kWidth; ++c) value[c] = load16(from + c * kLanes);
    CF_UNROLL
    for (int q = 0; q < kQueries; ++q) {
      const Vector16 weight = set16(block.scores[q * kPage + position]);
      CF_UNROLL
      for (int c = 0; c < kWidth; ++c) {
        acc[q * kWidth + c] = mul_add16(weight, value[c], acc[q * kWidth + c]);
      }
    }
  }
  CF_UNROLL
  for (int q = 0; q < kQueries; ++q) {
    const std::int64_t end = visible(block, q, page_start);
    for (std::int64_t position = common; position < end; ++position) {
      const T* from = values + position * padded_dim + column;
      const Vector16 weight = set16(block.scores[q * kPage + position]);
      CF_UNROLL
      for (int c = 0; c < kWidth; ++c) {
        acc[q * kWidth + c] = mul_add16(weight, load16(from + c * kLanes), acc[q * kWidth + c]);
      }
    }
    CF_UNROLL
    for (int c = 0; c < kWidth; ++c) {
      store16(acc[q * kWidth + c], block.out + q * padded_dim + column + c * kLanes);
    }
  }
}

template <int kQueries, typename T>
HWY_INLINE void page_output(QueryBlock& block, std::int64_t padded_dim, const T* values,
                            std::int64_t page_start) {
  std::int64_t column = 0;
  for (; column + kColumns * kLanes <= padded_dim; column += kColumns * kLanes) {
    page_output_columns<kQueries, kColumns>(block, padded_dim, values, page_start, column);
  }
  for (; column < padded_dim; column += kLanes) {
    page_output_columns<kQueries, 1>(block, padded_dim, values, page_start, column);
  }
}

template <int kQueries, typename T>
HWY_NOINLINE void attend_block(const AttentionTask& task, std::int64_t first, float* scratch) {
  const std::int64_t padded_dim = task.layout.padded_dim;
  QueryBlock block{};
  block.count = kQueries;
  block.first_position = task.first_position + first;
  block.scores = scratch;
  block.out = scratch + kQueryBlock * kPage;
  std::fill_n(block.out, kQueries * padded_dim, 0.0f);
  std::fill_n(block.largest, kQueries, -std::numeric_limits<float>::infinity());

  const float* query = task.query + first * task.query_stride;
  const std::int64_t positions = block.first_position + kQueries;
  for (std::int64_t start = 0; start < positions; start += kPage) {
    const T* keys = reinterpret_cast<const T*>(task.pages[start / kPage] + task.page_offset);
    page_scores<kQueries>(task, query, keys, block.scores);
    for (int q = 0; q < kQueries; ++q) update_softmax(block, q, start);
    page_output<kQueries>(block, padded_dim, keys + task.layout.key_elements(), start);
  }
  for (int q = 0; q < kQueries; ++q) {
    float* out = task.out + (first + q) * task.out_stride;
    for (std::int64_t i = 0; i < task.layout.head_dim; ++i) {
      out[i] = block.out[q * padded_dim + i] / block.sum[q];
    }
  }
}

// Blocks start at multiples of kQueryBlock, so that all queries of a block end in one page.
void attend_kernel(const AttentionTask& task, float* scratch) {
  with_type(task.layout.dtype, [&](auto* null) HWY_ATTR {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(null)>>;
    std::int64_t first = 0;
    while (first < task.queries) {
      const std::int64_t position = task.first_position + first;
      if (position % kQueryBlock == 0 && first + kQueryBlock <= task.queries) {
        attend_block<kQueryBlock, T>(task, first, scratch);
        first += kQueryBlock;
      } else {
        attend_block<1, T>(task, first, scratch);
        first += 1;
      }
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace clusterfusion::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace clusterfusion::cpu {
HWY_EXPORT(attend_kernel);

std::int64_t KvLayout::key_elements() const noexcept { return head_dim * kKvPagePositions; }
std::int64_t KvLayout::elements() const noexcept {
  return key_elements() + padded_dim * kKvPagePositions;
}

std::int64_t attention_scratch(std::int64_t head_dim) noexcept {
  return kQueryBlock * (kKvPagePositions + padded(head_dim));
}

void attend(const AttentionTask& task, float* scratch) {
  HWY_DYNAMIC_DISPATCH(attend_kernel)(task, scratch);
}
}  // namespace clusterfusion::cpu
#endif
