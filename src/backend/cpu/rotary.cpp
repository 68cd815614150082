#include "backend/cpu/rotary.hpp"

#include <cmath>

#include "backend/backend.hpp"
#include "backend/cpu/narrow.hpp"

namespace clusterfusion::cpu {
namespace {

template <typename T, typename Narrow>
void store(const KvLayout& layout, const float* key, const float* value, std::int64_t slot,
           std::byte* page_head, Narrow narrow) {
  T* keys = reinterpret_cast<T*>(page_head);
  T* values = keys + layout.key_elements() + slot * layout.padded_dim;
  for (std::int64_t i = 0; i < layout.head_dim; ++i) {
    keys[i * kKvPagePositions + slot] = narrow(key[i]);
  }
  for (std::int64_t i = 0; i < layout.head_dim; ++i) values[i] = narrow(value[i]);
  for (std::int64_t i = layout.head_dim; i < layout.padded_dim; ++i) values[i] = narrow(0.0f);
}

}  // namespace

RotaryTable::RotaryTable(std::int64_t rotary_dim, double theta) {
  for (std::int64_t i = 0; i < rotary_dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(rotary_dim);
    const float power = static_cast<float>(std::pow(theta, static_cast<double>(exponent)));
    inverse_frequencies_.push_back(1.0f / power);
  }
}

void RotaryTable::fill(std::span<const std::int64_t> positions, float* rows) const {
  const std::size_t half = inverse_frequencies_.size();
  for (const std::int64_t position : positions) {
    for (std::size_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * inverse_frequencies_[i];
      rows[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
      rows[half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
    }
    rows += 2 * half;
  }
}

void rotate(float* head, const float* cos_sin, std::int64_t rotary_dim) {
  const std::int64_t half = rotary_dim / 2;
  for (std::int64_t i = 0; i < half; ++i) {
    const float cos = cos_sin[i];
    const float sin = cos_sin[half + i];
    const float low = head[i];
    const float high = head[half + i];
    head[i] = low * cos - high * sin;
    head[half + i] = high * cos + low * sin;
  }
}

void store_key_value(const KvLayout& layout, const float* key, const float* value,
                     std::int64_t slot, std::byte* page_head) {
  switch (layout.dtype) {
    case DType::float16:
      return store<std::uint16_t>(layout, key, value, slot, page_head, bits_of_float16);
    case DType::bfloat16:
      return store<std::uint16_t>(layout, key, value, slot, page_head, bits_of_bfloat16);
    case DType::float32:
      return store<float>(layout, key, value, slot, page_head, [](float v) { return v; });
  }
}

}  // namespace clusterfusion::cpu
