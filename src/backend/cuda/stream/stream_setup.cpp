#include "backend/cuda/stream/stream_setup.hpp"

#include <algorithm>

#include "backend/cuda/decode/decode_setup.hpp"
#include "base/round_up.hpp"

namespace clusterfusion::cuda {
namespace {

StreamedProduct streamed(const plan::ProductCut& cut) {
  StreamedProduct product;
  product.rows = static_cast<std::int32_t>(cut.rows);
  product.parts = cut.parts;
  product.chunks = cut.chunks;
  product.pieces = cut.pieces;
  product.iterations = cut.iterations;
  product.piece_steps = cut.piece_steps();
  product.piece_bytes = static_cast<std::int32_t>(cut.piece_columns() * 2);
  product.part_bytes = static_cast<std::int32_t>(cut.part_columns() * 2);
  product.row_bytes = static_cast<std::int32_t>(cut.columns * 2);
  product.row_pitch = static_cast<std::int32_t>(cut.row_pitch());
  return product;
}

std::int32_t max_splits(const ModelConfig& config, std::int32_t sm_count) {
  return std::clamp(sm_count / static_cast<std::int32_t>(config.num_heads), 1, plan::kMaxSplits);
}

}  // namespace

StreamParams describe_model(const ModelConfig& config, const plan::ProductCuts& cuts,
                            const plan::KvPlan& kv, const DeviceModel& weights,
                            std::int32_t sm_count) {
  StreamParams p{};
  p.qkv = streamed(cuts.qkv);
  p.mlp_up = streamed(cuts.mlp_up);
  p.mlp_down = streamed(cuts.mlp_down);
  p.attention_out = streamed(cuts.attention_out);
  p.lm_head = streamed(cuts.lm_head);
  weights.tell(p);
  set_shape(p, config, kv);
  p.max_splits = max_splits(config, sm_count);
  return p;
}

RowsLayout rows_layout(const ModelConfig& config, const plan::ProductCuts& cuts,
                       std::int32_t sm_count, std::int32_t rows) {
  RowsLayout layout{};
  const auto take = [&](std::int64_t bytes) {
    const std::int32_t offset = layout.bytes;
    layout.bytes += static_cast<std::int32_t>(round_up(bytes, 256));
    return offset;
  };
  const std::int64_t hidden = config.hidden_size;
  layout.input_rows = static_cast<std::int32_t>(round_up(rows, 8));
  layout.input_norm = take(layout.input_rows * hidden * 2);
  layout.post_norm = take(layout.input_rows * hidden * 2);
  layout.qkv = take(rows * hidden * 12);
  layout.mlp = take(layout.input_rows * config.intermediate_size * 2);
  layout.attention = take(layout.input_rows * hidden * 2);
  layout.residual = take((cuts.mlp_down.parts + 1) * rows * hidden * 4);
  layout.partials =
      take(rows * config.num_heads * max_splits(config, sm_count) * (config.head_dim + 2) * 4);
  layout.candidates = take(std::int64_t{rows} * sm_count * kReducerWarps *
                           static_cast<std::int64_t>(sizeof(Candidate)));
  return layout;
}

}  // namespace clusterfusion::cuda
