#include "backend/cuda/gemm/gemm_decoder.hpp"

#include <algorithm>
#include <array>

#include "backend/cuda/check.hpp"
#include "backend/cuda/gemm/product_kernel.hpp"
#include "backend/cuda/stream/stream_setup.hpp"
#include "base/fail.hpp"
#include "plan/product_tiles.hpp"

namespace clusterfusion::cuda {

using plan::Stream;

namespace {

// Of input vectors, as paired_rows.cuh has them.
constexpr std::int32_t lines_of(std::int32_t rows) { return (rows + 15) / 16 * 16; }

}  // namespace

bool GemmDecoder::supports(const ModelConfig& config) {
  try {
    plan::cut_products(config);
  } catch (const Error&) {
    return false;
  }
  return config.dtype != DType::float32 && config.hidden_size <= kMaxResidualSize &&
         RowsAttention::supports(config.dtype, config.head_dim);
}

GemmDecoder::GemmDecoder(const ModelConfig& config, const plan::KvPlan& kv,
                         const DeviceModel& weights, const plan::DeviceLimits& limits,
                         std::int64_t max_positions, std::int32_t max_steps)
    : config_(config),
      cuts_(plan::cut_products(config)),
      limits_(limits),
      max_steps_(max_steps),
      attention_(config.dtype, config.head_dim, limits),
      params_(describe_model(config, cuts_, kv, weights, limits.sm_count)),
      tables_(kMaxGemmRows, max_positions / plan::kKvPagePositions + 1, 1) {
  vectors_ = DeviceMemory(rows_layout(config, cuts_, limits.sm_count, kMaxGemmRows).bytes,
                          "vectors of many rows");
  params_.lamport = vectors_.as<>();
  params_.logits_stride = static_cast<std::int32_t>((config.vocab_size + 3) / 4 * 4);
  residual_ = DeviceMemory(kMaxGemmRows * config.hidden_size * 4, "the residual stream");
  means_ = DeviceMemory(kMaxGemmRows * 4, "means of many rows");
  logits_ =
      DeviceMemory(std::int64_t{kMaxGemmRows} * params_.logits_stride * 4, "logits of many rows");
  chosen_ = DeviceMemory(std::int64_t{max_steps} * kMaxGemmRows * 4, "tokens of many rows");
}

void GemmDecoder::begin(std::span<const DecodeRow> rows, cudaStream_t stream) {
  tables_.send(rows, 0, limits_.sm_count, params_, stream);
  params_.layout = rows_layout(config_, cuts_, limits_.sm_count, lines_of(params_.rows));
  positions_.clear();
  for (const DecodeRow& row : rows) positions_.push_back(static_cast<std::int32_t>(row.position));
}

void GemmDecoder::enqueue(std::span<const DecodeRow> rows, std::int32_t steps, bool,
                          cudaStream_t stream) {
  require(steps <= max_steps_, ErrorKind::internal, "rows: expected at most {} steps, found {}",
          max_steps_, steps);
  begin(rows, stream);
  const auto stride = static_cast<std::int32_t>(sizeof(StreamedRow) / sizeof(TokenId));
  Inputs inputs{tables_.input(0, 0), stride};
  for (std::int32_t step = 0; step < steps; ++step) {
    std::int32_t* chosen = chosen_.as<std::int32_t>() + step * params_.rows;
    run_step(step, inputs, chosen, stream);
    inputs = {chosen, 1};
  }
}

void GemmDecoder::enqueue_step(std::span<const DecodeRow> rows, std::int32_t index,
                               std::span<const TokenId* const> device_inputs, cudaStream_t stream) {
  if (index == 0) begin(rows, stream);
  for (std::size_t i = 0; i < device_inputs.size(); ++i)
    if (device_inputs[i] != nullptr)
      check(cudaMemcpyAsync(tables_.input(0, i), device_inputs[i], sizeof(TokenId),
                            cudaMemcpyDeviceToDevice, stream),
            "handing on tokens");
  const auto stride = static_cast<std::int32_t>(sizeof(StreamedRow) / sizeof(TokenId));
  run_step(index, {tables_.input(0, 0), stride}, chosen_.as<std::int32_t>() + index * kMaxGemmRows,
           stream);
}

void GemmDecoder::run_step(std::int32_t step, const Inputs& inputs, std::int32_t* chosen,
                           cudaStream_t stream) {
  splits_ = 1;
  for (const std::int32_t position : positions_)
    splits_ = std::max(splits_,
                       plan::attention_splits(position + step + 1, params_.kv_block_positions,
                                              params_.num_heads, params_.head_dim, limits_.sm_count)
                           .splits);
  for (std::int32_t layer = 0; layer < params_.num_layers; ++layer) {
    normalize(layer, true, layer == 0 ? &inputs : nullptr, stream);
    run_layer(layer, step, stream);
  }
  normalize(params_.num_layers, true, nullptr, stream);
  run_products(0, std::array{Stream::lm_head}, stream);
  launch_choice(params_, logits_.as<float>(), step, chosen, stream);
}

void GemmDecoder::run_layer(std::int32_t layer, std::int32_t step, cudaStream_t stream) {
  const std::int32_t phases = plan::layer_phases(config_.parallel_residual);
  for (std::int32_t index = 0; index < phases; ++index) {
    const plan::Phase phase = plan::layer_phase(config_.parallel_residual, index);
    if (phase.first == Stream::mlp_up) normalize(layer, false, nullptr, stream);
    if (phase.attention_before) attention_.launch(params_, layer, step, splits_, stream);
    const std::array streams{phase.first, phase.second};
    run_products(layer, std::span(streams).first(phase.second == Stream::none ? 1 : 2), stream);
  }
}

void GemmDecoder::normalize(std::int32_t layer, bool begins_layer, const Inputs* inputs,
                            cudaStream_t stream) {
  const bool is_head = layer == params_.num_layers;
  const std::int32_t mlp_parts = params_.mlp_down.parts;
  ResidualParams r{};
  r.tokens = inputs ? inputs->tokens : nullptr;
  r.token_stride = inputs ? inputs->stride : 0;
  // Amid a layer it is attention's; else the second MLP matrix's, and attention's where the
  // residual is parallel.
  if (inputs == nullptr) {
    r.first_owed = begins_layer ? 0 : mlp_parts;
    r.last_owed = !begins_layer || params_.parallel_residual ? mlp_parts + 1 : mlp_parts;
  }
  const auto of_layer = [&](const void* of_first) {
    return static_cast<const char*>(of_first) + layer * params_.layer_stride;
  };
  const StreamedLayer& first = params_.first_layer;
  const auto add = [&](const void* weight, const void* bias, std::int32_t output) {
    r.norms[r.norm_count++] = {weight, bias, output};
  };
  if (is_head)
    add(params_.final_norm_weight, params_.final_norm_bias, params_.layout.input_norm);
  else if (begins_layer)
    add(of_layer(first.input_norm_weight), of_layer(first.input_norm_bias),
        params_.layout.input_norm);
  if (!is_head && (!begins_layer || params_.parallel_residual))
    add(of_layer(first.post_norm_weight), of_layer(first.post_norm_bias), params_.layout.post_norm);
  r.residual = residual_.as<float>();
  r.means = means_.as<float>();
  launch_residual(config_.dtype, params_, r, stream);
}

void GemmDecoder::run_products(std::int32_t layer, std::span<const Stream> streams,
                               cudaStream_t stream) {
  ProductParams products{};
  products.rows = params_.rows;
  products.lines = lines_of(params_.rows);
  products.activation = params_.activation;
  for (const Stream which : streams) add_operands(which, layer, products);
  const ProductBlock block = product_block(params_.rows);
  products.row_blocks = (params_.rows + block.rows - 1) / block.rows;
  std::array<std::int32_t, kMaxProductOperands> chunks{};
  for (std::int32_t i = 0; i < products.count; ++i) chunks[i] = products.operands[i].chunks;
  products.tile_chunks = plan::tile_chunks(std::span(chunks).first(products.count),
                                           products.row_blocks, block.max_chunks, limits_.sm_count);
  for (std::int32_t i = 0; i < products.count; ++i) {
    ProductOperand& operand = products.operands[i];
    operand.tiles = (operand.chunks + products.tile_chunks - 1) / products.tile_chunks;
    products.tiles += operand.tiles;
  }
  launch_products(config_.dtype, products, stream);
}

void GemmDecoder::add_operands(Stream stream, std::int32_t layer, ProductParams& products) const {
  const std::int32_t parts = stream == Stream::mlp_down ? params_.mlp_down.parts : 1;
  for (std::int32_t part = 0; part < parts; ++part)
    products.operands[products.count++] = operand_of(stream, layer, part);
}

ProductOperand GemmDecoder::operand_of(Stream stream, std::int32_t layer, std::int32_t part) const {
  const StreamedLayer& first = params_.first_layer;
  const RowsLayout& layout = params_.layout;
  struct Source {
    const StreamedProduct* product;
    const char *weights, *biases;
    std::int32_t input, output;
  };
  const auto source = [&]() -> Source {
    switch (stream) {
      case Stream::qkv:
        return {&params_.qkv, first.qkv, first.qkv_bias, layout.input_norm, layout.qkv};
      case Stream::mlp_up:
        return {&params_.mlp_up, first.mlp_up, first.mlp_up_bias, layout.post_norm, layout.mlp};
      case Stream::mlp_down:
        return {&params_.mlp_down, first.mlp_down, first.mlp_down_bias, layout.mlp,
                layout.residual};
      case Stream::attention_out:
        return {&params_.attention_out, first.attention_out, first.attention_out_bias,
                layout.attention,
                layout.residual + params_.mlp_down.parts * params_.rows * params_.hidden_size * 4};
      default: return {&params_.lm_head, params_.lm_head_weight, nullptr, layout.input_norm, 0};
    }
  }();
  const StreamedProduct& product = *source.product;
  const std::int64_t of_layer = stream == Stream::lm_head ? 0 : layer * params_.layer_stride;
  ProductOperand operand{};
  operand.stream = stream;
  operand.weights = source.weights + of_layer + std::int64_t{part} * product.part_bytes;
  if (source.biases != nullptr && part == 0)
    operand.biases = reinterpret_cast<const float*>(source.biases + of_layer);
  operand.input = params_.lamport + source.input + std::int64_t{part} * product.part_bytes;
  operand.output = stream == Stream::lm_head
                       ? reinterpret_cast<char*>(logits_.as<float>())
                       : params_.lamport + source.output +
                             std::int64_t{part} * params_.rows * params_.hidden_size * 4;
  operand.row_bytes = operand.input_row_bytes = product.row_bytes;
  operand.rows = product.rows;
  operand.output_row = stream == Stream::lm_head ? params_.logits_stride : product.rows;
  operand.pieces = product.pieces;
  operand.iterations = product.iterations;
  operand.piece_steps = product.piece_steps;
  operand.chunks = product.chunks;
  return operand;
}

}  // namespace clusterfusion::cuda
