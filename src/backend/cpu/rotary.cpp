#include "backend/cpu/rotary.hpp"

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
