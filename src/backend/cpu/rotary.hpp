// Rotary position embedding, and storing keys and values in KV pages.
#pragma once

#include <cstdint>

#include "backend/cpu/kernels.hpp"

namespace clusterfusion::cpu {

// Rotates the first rotary_dim values of a head in place: pairs are i and i + rotary_dim / 2
// (transformers' rotate_half). `cos_sin`: cosines, then sines, of the
// position's plan::RotaryTable::turn().
void rotate(float* head, const float* cos_sin, std::int64_t rotary_dim);

// Puts one position's key and value of one head (head_dim floats each) into a page.
void store_key_value(const KvLayout& layout, const float* key, const float* value,
                     std::int64_t slot, std::byte* page_head);

}  // namespace clusterfusion::cpu
