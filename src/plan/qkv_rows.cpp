#include "plan/qkv_rows.hpp"

namespace clusterfusion::plan {

std::vector<MatrixRows> qkv_rows(const LayerSpec& spec) {
  if (spec.qkv_layout == QkvLayout::by_kv_head)
    return {{LayerTensor::qkv_weight, 0, spec.qkv_size()}};
  const std::int64_t query_rows = spec.heads_per_kv_head() * spec.head_dim;
  std::vector<MatrixRows> rows;
  for (std::int64_t head = 0; head < spec.kv_heads(); ++head) {
    rows.push_back({LayerTensor::query_weight, head * query_rows, query_rows});
    rows.push_back({LayerTensor::key_weight, head * spec.head_dim, spec.head_dim});
    rows.push_back({LayerTensor::value_weight, head * spec.head_dim, spec.head_dim});
  }
  return rows;
}

ModelConfig with_gathered_qkv(ModelConfig config) {
  config.qkv_layout = QkvLayout::by_kv_head;
  return config;
}

}  // namespace clusterfusion::plan
