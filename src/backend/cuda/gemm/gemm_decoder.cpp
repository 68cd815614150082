#include "backend/cuda/gemm/gemm_decoder.hpp"

#include <algorithm>
#include <array>

#include "backend/cuda/check.hpp"
#include "backend/cuda/device_properties.hpp"
#include "backend/cuda/gemm/product_input.hpp"
#include "backend/cuda/gemm/product_kernel.hpp"
#include "backend/cuda/stream/stream_setup.hpp"
#include "backend/cuda/tensor_map.hpp"
#include "base/fail.hpp"
#include "plan/product_tiles.hpp"

namespace clusterfusion::cuda {

using plan::Stream;

bool GemmDecoder::supports(const ModelConfig& config, const cudaDeviceProp& properties) {
  if (!has_warpgroups(properties)) return false;
  try {
    plan::cut_products(config);
  } catch (const Error&) {
    return false;
  }
  const auto shared_bytes = static_cast<std::int64_t>(properties.sharedMemPerBlockOptin);
  return config.dtype != DType::float32 && config.hidden_size <= kMaxResidualSize &&
         shared_bytes >= kProductSharedBytes &&
         RowsAttention::supports(config.dtype, config.head_dim);
}

GemmDecoder::GemmDecoder(const ModelConfig& config, const plan::KvPlan& kv,
                         const DeviceModel& weights, std::int32_t sm_count,
                         std::int64_t max_positions, std::int32_t max_steps)
    : config_(config),
      cuts_(plan::cut_products(config)),
      sm_count_(sm_count),
      max_steps_(max_steps),
      attention_(config.dtype, config.head_dim, sm_count),
      params_(describe_model(config, cuts_, kv, weights, sm_count)),
      tables_({.rows = kMaxGemmRows, .pages = max_positions / plan::kKvPagePositions + 1}) {
  prepare_products(config.dtype);
  vectors_ = DeviceMemory(rows_layout(config, cuts_, sm_count, kMaxGemmRows).bytes,
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
  extent_ = tables_.send(rows, 0, sm_count_, params_, stream);
  params_.layout = rows_layout(config_, cuts_, sm_count_, gemm::input_lines(params_.rows));
  phases_.clear();
  for (std::int32_t index = 0; index < plan::layer_phases(config_.parallel_residual); ++index) {
    const plan::Phase phase = plan::layer_phase(config_.parallel_residual, index);
    const std::array streams{phase.first, phase.second};
    phases_.push_back(products_of(std::span(streams).first(phase.second == Stream::none ? 1 : 2)));
  }
  phases_.push_back(products_of(std::array{Stream::lm_head}));
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
    splits_ =
        std::max(splits_, plan::attention_splits(position + step + 1, params_.kv_block_positions,
                                                 params_.num_heads, params_.head_dim, sm_count_)
                              .splits);
  for (std::int32_t layer = 0; layer < params_.num_layers; ++layer) {
    normalize(layer, true, layer == 0 ? &inputs : nullptr, stream);
    run_layer(layer, step, stream);
  }
  normalize(params_.num_layers, true, nullptr, stream);
  run_products(phases_.back(), 0, stream);
  launch_choice(params_, logits_.as<float>(), step, chosen, stream);
}

void GemmDecoder::run_layer(std::int32_t layer, std::int32_t step, cudaStream_t stream) {
  const std::int32_t phases = plan::layer_phases(config_.parallel_residual);
  for (std::int32_t index = 0; index < phases; ++index) {
    const plan::Phase phase = plan::layer_phase(config_.parallel_residual, index);
    if (phase.first == Stream::mlp_up) normalize(layer, false, nullptr, stream);
    if (phase.attention_before) attention_.launch(params_, extent_, splits_, layer, step, stream);
    run_products(phases_[index], layer, stream);
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
    r.first_pending = begins_layer ? 0 : mlp_parts;
    r.last_pending = !begins_layer || params_.parallel_residual ? mlp_parts + 1 : mlp_parts;
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

void GemmDecoder::run_products(const ProductParams& of_first, std::int32_t layer,
                               cudaStream_t stream) const {
  ProductParams products = of_first;
  for (std::int32_t i = 0; i < products.count; ++i) {
    ProductOperand& operand = products.operands[i];
    operand.layer = layer;
    operand.ablated = operand.stream == Stream::mlp_up && params_.ablated.has_mlp(layer);
    if (operand.biases != nullptr) operand.biases += layer * params_.layer_stride / 4;
  }
  launch_products(config_.dtype, products, stream);
}

ProductParams GemmDecoder::products_of(std::span<const Stream> streams) const {
  ProductParams products{};
  products.rows = params_.rows;
  products.activation = params_.activation;
  for (std::size_t i = 0; i < streams.size(); ++i)
    add_operands(streams[i], static_cast<std::int32_t>(i), products);
  const ProductBlock block = product_block(params_.rows);
  products.row_blocks = (params_.rows + block.rows - 1) / block.rows;
  std::array<std::int32_t, kMaxProductOperands> chunks{};
  for (std::int32_t i = 0; i < products.count; ++i) chunks[i] = products.operands[i].chunks;
  products.tile_chunks =
      plan::tile_chunks(std::span(chunks).first(products.count), products.row_blocks,
                        {block.max_chunks, block.rows / plan::kChunkRows}, sm_count_);
  for (std::int32_t i = 0; i < products.count; ++i) {
    ProductOperand& operand = products.operands[i];
    operand.tiles = (operand.chunks + products.tile_chunks - 1) / products.tile_chunks;
    products.tiles += operand.tiles;
  }
  for (std::size_t i = 0; i < streams.size(); ++i) {
    const Matrix matrix = matrix_of(streams[i]);
    products.weight_maps[i] = weight_map(matrix, products.tile_chunks * plan::kChunkRows);
    products.input_maps[i] = input_map(matrix, block.rows);
  }
  return products;
}

void GemmDecoder::add_operands(Stream stream, std::int32_t source, ProductParams& products) const {
  const Matrix matrix = matrix_of(stream);
  const StreamedProduct& product = *matrix.product;
  const bool is_head = stream == Stream::lm_head;
  const std::int32_t part_columns = product.part_bytes / 2;
  for (std::int32_t part = 0; part < product.parts; ++part) {
    ProductOperand& operand = products.operands[products.count++];
    operand.stream = stream;
    operand.source = source;
    operand.first_column = part * part_columns;
    operand.columns = product.row_bytes / 2;
    operand.rows = product.rows;
    if (matrix.biases != nullptr && part == 0)
      operand.biases = reinterpret_cast<const float*>(matrix.biases);
    operand.output = matrix.output + std::int64_t{part} * params_.rows * params_.hidden_size * 4;
    operand.output_row = is_head ? params_.logits_stride : product.rows;
    operand.pieces = product.pieces;
    operand.iterations = product.iterations;
    operand.piece_steps = product.piece_steps;
    operand.chunks = product.chunks;
  }
}

GemmDecoder::Matrix GemmDecoder::matrix_of(Stream stream) const {
  const StreamedLayer& first = params_.first_layer;
  const RowsLayout& layout = params_.layout;
  char* vectors = params_.lamport;
  switch (stream) {
    case Stream::qkv:
      return {&params_.qkv, first.qkv, first.qkv_bias, vectors + layout.input_norm,
              vectors + layout.qkv};
    case Stream::mlp_up:
      return {&params_.mlp_up, first.mlp_up, first.mlp_up_bias, vectors + layout.post_norm,
              vectors + layout.mlp};
    case Stream::mlp_down:
      return {&params_.mlp_down, first.mlp_down, first.mlp_down_bias, vectors + layout.mlp,
              vectors + layout.residual};
    case Stream::attention_out:
      return {&params_.attention_out, first.attention_out, first.attention_out_bias,
              vectors + layout.attention,
              vectors + layout.residual +
                  std::int64_t{params_.mlp_down.parts} * params_.rows * params_.hidden_size * 4};
    default:
      return {&params_.lm_head, params_.lm_head_weight, nullptr, vectors + layout.input_norm,
              logits_.as<>()};
  }
}

CUtensorMap GemmDecoder::weight_map(const Matrix& matrix, std::int32_t box_rows) const {
  const auto columns = static_cast<std::uint64_t>(matrix.product->row_bytes / 2);
  const bool is_head = matrix.product == &params_.lm_head;
  const std::uint64_t layers = is_head ? 1 : params_.num_layers;
  const auto layer_stride =
      static_cast<std::uint64_t>(layers > 1 ? params_.layer_stride : matrix.product->row_bytes);
  const std::array sizes{columns, static_cast<std::uint64_t>(matrix.product->rows), layers};
  const std::array strides{columns * 2, layer_stride};
  const std::array box{std::uint32_t{plan::kStepColumns}, static_cast<std::uint32_t>(box_rows), 1u};
  return make_box_map({config_.dtype, matrix.weights, sizes, strides, box});
}

// Eight rows of a piece lie side by side.
CUtensorMap GemmDecoder::input_map(const Matrix& matrix, std::int32_t box_rows) const {
  constexpr std::uint32_t kPieceColumns = plan::kStepColumns / gemm::kStepPieces;
  const auto columns = static_cast<std::uint64_t>(matrix.product->row_bytes / 2);
  const auto lines = static_cast<std::uint64_t>(gemm::input_lines(params_.rows));
  const std::array<std::uint64_t, 3> sizes{8 * kPieceColumns, lines / 8, columns / kPieceColumns};
  const std::array<std::uint64_t, 2> strides{8 * kPieceColumns * 2, lines * kPieceColumns * 2};
  const std::array<std::uint32_t, 3> box{
      8 * kPieceColumns, static_cast<std::uint32_t>(box_rows / 8), gemm::kStepPieces};
  return make_box_map({config_.dtype, matrix.input, sizes, strides, box});
}

}  // namespace clusterfusion::cuda
