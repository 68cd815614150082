// Decode steps of many rows as a series of kernels: matrix products, attention, the residual
// stream. For more rows than the streaming kernel takes, and for sizes that do not stream. A row's
// bits are those of the streaming kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "backend/cuda/device_model.hpp"
#include "backend/cuda/gemm/product_params.hpp"
#include "backend/cuda/gemm/row_step.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/row_decoder.hpp"
#include "backend/cuda/stream/row_tables.hpp"
#include "plan/stream_plan.hpp"

namespace clusterfusion::cuda {

// Rows of one step, at most.
inline constexpr std::int32_t kMaxGemmRows = 256;

class GemmDecoder final : public RowDecoder {
 public:
  // Whether there are kernels for this shape.
  static bool supports(const ModelConfig& config, const cudaDeviceProp& properties);

  // Errors: unsupported (see supports()), out_of_memory.
  GemmDecoder(const ModelConfig& config, const plan::KvPlan& kv, const DeviceModel& weights,
              std::int32_t sm_count, std::int64_t max_positions, std::int32_t max_steps);

  std::int32_t max_rows() const noexcept override { return kMaxGemmRows; }
  void intervene(const LaunchInterventions& interventions) noexcept override {
    interventions.tell(params_);
  }
  void enqueue(std::span<const DecodeRow> rows, std::int32_t steps, bool with_logits,
               cudaStream_t stream) override;
  void enqueue_step(std::span<const DecodeRow> rows, std::int32_t index,
                    std::span<const TokenId* const> device_inputs, cudaStream_t stream) override;
  const float* logits(std::size_t row) const noexcept override {
    return logits_.as<float>() + row * static_cast<std::size_t>(params_.logits_stride);
  }
  const std::int32_t* chosen(std::int32_t index = 0) const noexcept override {
    return chosen_.as<std::int32_t>() + index * kMaxGemmRows;
  }

 private:
  // Where the inputs of a step lie: tokens[row * stride].
  struct Inputs {
    const std::int32_t* tokens;
    std::int32_t stride;
  };
  void begin(std::span<const DecodeRow> rows, cudaStream_t stream);
  void run_step(std::int32_t step, const Inputs& inputs, std::int32_t* chosen, cudaStream_t stream);
  void run_layer(std::int32_t layer, std::int32_t step, cudaStream_t stream);
  // `of_first`: the products of the first layer.
  void run_products(const ProductParams& of_first, std::int32_t layer, cudaStream_t stream) const;
  ProductParams products_of(std::span<const plan::Stream> streams) const;
  // A matrix of the first layer, what it multiplies, and where the result goes.
  struct Matrix {
    const StreamedProduct* product;
    const char *weights, *biases;
    char *input, *output;
  };
  Matrix matrix_of(plan::Stream stream) const;
  // All parts of a matrix, whose maps are number `source`.
  void add_operands(plan::Stream stream, std::int32_t source, ProductParams& products) const;
  CUtensorMap weight_map(const Matrix& matrix, std::int32_t box_rows) const;
  CUtensorMap input_map(const Matrix& matrix, std::int32_t box_rows) const;
  // In front of a phase that normalises; `layer` may be behind the last.
  void normalize(std::int32_t layer, bool begins_layer, const Inputs* inputs, cudaStream_t stream);

  ModelConfig config_;
  plan::ProductCuts cuts_;
  std::int32_t sm_count_, max_steps_;
  RowsAttention attention_;
  StreamParams params_;
  RowTables tables_;
  // For the rows of begin():
  plan::TaskExtent extent_;
  std::vector<ProductParams> phases_;    // of the first layer, and the LM head
  std::int32_t splits_ = 1;              // of attention in this step, at most
  std::vector<std::int32_t> positions_;  // of the rows, in the first step
  DeviceMemory vectors_, residual_, means_, logits_, chosen_;
};

}  // namespace clusterfusion::cuda
