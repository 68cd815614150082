// Attention of the layer calls on the CPU: over a caller's own caches, in rows or in pages.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/cpu/layer_rows.hpp"
#include "backend/layer_ops.hpp"

namespace clusterfusion::cpu {

// Where each row's new token belongs, as far as positions and block table tell.
class RowPositions {
 public:
  RowPositions() = default;  // of no rows
  // Errors: invalid_argument, two rows write to one place.
  explicit RowPositions(const LayerWork& work);

  // Nothing is read or written for a row whose position or pages are outside.
  bool is_inside(std::int64_t row) const { return at(row) >= 0; }
  std::int64_t at(std::int64_t row) const { return positions_[static_cast<std::size_t>(row)]; }

 private:
  std::vector<std::int64_t> positions_;  // -1: outside
};

// Queries, keys and values of all rows as a layer's products give them: together in `qkv`, for each
// head of keys and values its queries, its key and its value; or else apart, heads in order.
struct ProjectedHeads {
  Rows* qkv = nullptr;
  Rows* queries = nullptr;
  Rows* keys = nullptr;
  Rows* values = nullptr;
};

// Normalises queries and keys if the spec says so, rotates them, writes all rows' new keys and
// values to the caches, k_new and v_new, and then computes what the heads give. Rows outside are
// left out of all of that.
void attend_rows(const LayerWork& work, const RowPositions& positions, const ProjectedHeads& in,
                 Rows& out);

}  // namespace clusterfusion::cpu
