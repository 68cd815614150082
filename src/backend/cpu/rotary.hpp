// Rotary position embedding, and storing keys and values in KV pages.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "backend/cpu/kernels.hpp"

namespace clusterfusion::cpu {

// cos and sin of position x inverse frequency, computed in float32 steps as transformers'
// GPTNeoXRotaryEmbedding does: theta^(-2i / rotary_dim) for i in [0, rotary_dim / 2).
class RotaryTable {
 public:
  RotaryTable(std::int64_t rotary_dim, double theta);

  // Fills rows [cos | sin], rotary_dim floats each, for `positions`.
  void fill(std::span<const std::int64_t> positions, float* rows) const;
  std::int64_t rotary_dim() const noexcept {
    return 2 * static_cast<std::int64_t>(inverse_frequencies_.size());
  }

 private:
  std::vector<float> inverse_frequencies_;
};

// Rotates the first rotary_dim values of a head in place: pairs are i and i + rotary_dim / 2
// (transformers' rotate_half). `cos_sin`: a row of RotaryTable::fill.
void rotate(float* head, const float* cos_sin, std::int64_t rotary_dim);

// Puts one position's key and value of one head (head_dim floats each) into a page.
void store_key_value(const KvLayout& layout, const float* key, const float* value,
                     std::int64_t slot, std::byte* page_head);

}  // namespace clusterfusion::cpu
