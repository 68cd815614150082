#include "backend/cpu/layer_attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "backend/backend.hpp"
#include "backend/cpu/narrow.hpp"
#include "backend/cpu/rotary.hpp"
#include "base/fail.hpp"

namespace clusterfusion::cpu {
namespace {

// Keys and values fewer than this are not worth waking the other threads.
constexpr std::int64_t kSerialLayerValues = 32 << 10;

// x cos + rotate_half(x) sin over the first rotary_dim values of a head (transformers'
// apply_rotary_pos_emb). Every value meets its own cos and sin, as the caller gave them.
void rotate_by(float* head, const float* cos, const float* sin, std::int64_t rotary_dim) {
  const std::int64_t half = rotary_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float low = head[i];
    const float high = head[half + i];
    head[i] = low * cos[i] - high * sin[i];
    head[half + i] = high * cos[half + i] + low * sin[half + i];
  }
}

// The page of a row that holds a position.
std::int64_t page_of(const LayerWork& work, std::int64_t row, std::int64_t position) {
  if (work.block_table == nullptr) return 0;
  return work.block_table[row * work.block_table_stride + position / work.cache.page_size];
}

// A head's first value in a cache, at a position of a row.
std::byte* in_cache(const LayerWork& work, void* cache, std::int64_t row, std::int64_t position,
                    std::int64_t kv_head) {
  const CacheLayout& layout = work.cache;
  const std::int64_t elements = page_of(work, row, position) * layout.page_stride +
                                position % layout.page_size * layout.position_stride +
                                kv_head * layout.head_stride;
  return static_cast<std::byte*>(cache) + elements * size_of(work.dtype);
}

// Keys and values of one head of a row, positions 0 to its new one, in the pages that attend()
// reads.
class HeadPages {
 public:
  HeadPages(const LayerWork& work, std::int64_t row, std::int64_t positions, std::int64_t kv_head)
      : layout_{DType::float32, work.spec.head_dim, padded(work.spec.head_dim)} {
    const std::int64_t pages = kv_pages_of(positions);
    storage_.resize(static_cast<std::size_t>(pages * layout_.elements()));
    for (std::int64_t page = 0; page < pages; ++page) {
      pages_.push_back(reinterpret_cast<std::byte*>(storage_.data() + page * layout_.elements()));
    }
    std::vector<float> key(static_cast<std::size_t>(layout_.head_dim));
    std::vector<float> value(key.size());
    for (std::int64_t position = 0; position < positions; ++position) {
      widen(work.dtype, in_cache(work, work.k_cache, row, position, kv_head), layout_.head_dim,
            key.data());
      widen(work.dtype, in_cache(work, work.v_cache, row, position, kv_head), layout_.head_dim,
            value.data());
      store_key_value(layout_, key.data(), value.data(), position % kKvPagePositions,
                      pages_[static_cast<std::size_t>(position / kKvPagePositions)]);
    }
  }

  const KvLayout& layout() const noexcept { return layout_; }
  const std::byte* const* pages() const noexcept { return pages_.data(); }

 private:
  KvLayout layout_;
  std::vector<float> storage_;
  std::vector<std::byte*> pages_;
};

// `positions`: -1 for rows that write nothing.
void require_own_places(const LayerWork& work, const std::vector<std::int64_t>& positions) {
  const std::int64_t size = work.cache.page_size;
  std::vector<std::int64_t> places;
  for (std::int64_t row = 0; row < work.rows; ++row) {
    const std::int64_t position = positions[static_cast<std::size_t>(row)];
    const std::int64_t page = position < 0 ? 0 : page_of(work, row, position);
    places.push_back(position < 0 ? -1 : page * size + position % size);
    const auto same = std::find(places.begin(), places.end() - 1, places.back());
    require(position < 0 || same == places.end() - 1, ErrorKind::invalid_argument,
            "block_table: expected a place of its own for the new key and value of each row, found "
            "that rows {} and {} both write to position {} of page {}",
            same - places.begin(), row, position % size, page);
  }
}

class RowsAttention {
 public:
  RowsAttention(const LayerWork& work, const RowPositions& positions, const ProjectedHeads& in,
                Rows& out)
      : work_(work), spec_(work.spec), positions_(positions), in_(in), out_(out) {
    if (!spec_.qk_norm) return;
    query_norm_ = norm_weight(LayerTensor::query_norm_weight);
    key_norm_ = norm_weight(LayerTensor::key_norm_weight);
  }

  // Of one row and one head of keys and values.
  void store(std::int64_t row, std::int64_t kv_head) {
    if (!positions_.is_inside(row)) return;
    for (std::int64_t head = first_head(kv_head); head < first_head(kv_head + 1); ++head) {
      prepare(query(row, head), query_norm_, row);
    }
    prepare(key(row, kv_head), key_norm_, row);
    store_new(row, kv_head, key(row, kv_head), work_.k_new, work_.k_cache);
    store_new(row, kv_head, value(row, kv_head), work_.v_new, work_.v_cache);
  }

  void attend(std::int64_t row, std::int64_t kv_head) {
    if (!positions_.is_inside(row)) return;
    const std::int64_t position = positions_.at(row);
    const HeadPages pages(work_, row, position + 1, kv_head);
    std::vector<float> scratch(static_cast<std::size_t>(attention_scratch(spec_.head_dim)));
    for (std::int64_t head = first_head(kv_head); head < first_head(kv_head + 1); ++head) {
      AttentionTask task;
      task.layout = pages.layout();
      task.pages = pages.pages();
      task.first_position = position;
      task.queries = 1;
      task.query = query(row, head);
      task.query_stride = spec_.head_dim;
      task.out = out_.row(row) + head * spec_.head_dim;
      task.out_stride = spec_.head_dim;
      task.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(spec_.head_dim)));
      cpu::attend(task, scratch.data());
    }
  }

 private:
  std::int64_t first_head(std::int64_t kv_head) const {
    return kv_head * spec_.heads_per_kv_head();
  }

  // Part `part` of a head of keys and values: its queries, then its key and its value.
  float* qkv_part(std::int64_t row, std::int64_t kv_head, std::int64_t part) {
    const std::int64_t parts = spec_.heads_per_kv_head() + 2;
    return in_.qkv->row(row) + (kv_head * parts + part) * spec_.head_dim;
  }

  float* query(std::int64_t row, std::int64_t head) {
    if (in_.qkv == nullptr) return in_.queries->row(row) + head * spec_.head_dim;
    const std::int64_t group = spec_.heads_per_kv_head();
    return qkv_part(row, head / group, head % group);
  }

  float* key(std::int64_t row, std::int64_t kv_head) {
    if (in_.qkv == nullptr) return in_.keys->row(row) + kv_head * spec_.head_dim;
    return qkv_part(row, kv_head, spec_.heads_per_kv_head());
  }

  float* value(std::int64_t row, std::int64_t kv_head) {
    if (in_.qkv == nullptr) return in_.values->row(row) + kv_head * spec_.head_dim;
    return qkv_part(row, kv_head, spec_.heads_per_kv_head() + 1);
  }

  Rows norm_weight(LayerTensor tensor) const {
    return Rows(work_.dtype, work_.weight(tensor), 1, spec_.head_dim);
  }

  void prepare(float* head, const Rows& norm, std::int64_t row) {
    if (spec_.qk_norm) {
      Rows normed(1, spec_.head_dim);  // rms_norm() pads what it writes; another head comes next
      rms_norm(head, norm.row(0), static_cast<float>(spec_.layer_norm_eps), spec_.head_dim,
               normed.row(0));
      std::copy_n(normed.row(0), spec_.head_dim, head);
    }
    const std::int64_t first = row * work_.rotary_stride;
    rotate_by(head, work_.cos + first, work_.sin + first, spec_.rotary_dim);
  }

  // Rounds a head's new key or value, as it will be read from the cache ever after.
  void store_new(std::int64_t row, std::int64_t kv_head, const float* values, void* result,
                 void* cache) {
    std::byte* stored = in_cache(work_, cache, row, positions_.at(row), kv_head);
    const std::int64_t bytes = spec_.head_dim * size_of(work_.dtype);
    narrow(work_.dtype, values, spec_.head_dim, stored);
    std::memcpy(static_cast<std::byte*>(result) + (row * spec_.kv_heads() + kv_head) * bytes,
                stored, static_cast<std::size_t>(bytes));
  }

  const LayerWork& work_;
  const LayerSpec& spec_;
  const RowPositions& positions_;
  const ProjectedHeads& in_;
  Rows& out_;
  Rows query_norm_, key_norm_;  // one row each, if the spec has them
};

}  // namespace

RowPositions::RowPositions(const LayerWork& work) {
  const std::int64_t most = work.max_pages * work.cache.page_size;
  for (std::int64_t row = 0; row < work.rows; ++row) {
    std::int64_t position = work.positions == nullptr ? work.position : work.positions[row];
    if (position < 0 || position >= most) position = -1;
    for (std::int64_t first = 0; first <= position; first += work.cache.page_size) {
      const std::int64_t page = page_of(work, row, first);
      if (page < 0 || page >= work.cache.pages) position = -1;
    }
    positions_.push_back(position);
  }
  if (work.block_table != nullptr) require_own_places(work, positions_);
}

void attend_rows(const LayerWork& work, const RowPositions& positions, const ProjectedHeads& in,
                 Rows& out) {
  RowsAttention attention(work, positions, in, out);
  const std::int64_t kv_heads = work.spec.kv_heads();
  std::int64_t values = 0;
  for (std::int64_t row = 0; row < work.rows; ++row) {
    values += (positions.at(row) + 1) * work.spec.kv_size();
  }
  const auto for_all = [&](const std::function<void(std::int64_t, std::int64_t)>& one) {
    const auto task = [&](std::int64_t i) { one(i / kv_heads, i % kv_heads); };
    if (values >= kSerialLayerValues) return run_tasks(work.rows * kv_heads, task);
    for (std::int64_t i = 0; i < work.rows * kv_heads; ++i) task(i);
  };
  if (work.rows == 1) {
    return for_all([&](std::int64_t row, std::int64_t kv_head) {
      attention.store(row, kv_head);
      attention.attend(row, kv_head);
    });
  }
  // Rows may be tokens of one sequence: each sees what those before it store.
  for_all([&](std::int64_t row, std::int64_t kv_head) { attention.store(row, kv_head); });
  for_all([&](std::int64_t row, std::int64_t kv_head) { attention.attend(row, kv_head); });
}

}  // namespace clusterfusion::cpu
