// A prompt as matrix-matrix work: many tokens of one sequence through all layers at once.
//
// Numbers: the residual stream, norms, softmax and all sums are float32; activations are
// rounded to the weights' type as they enter a product. The same call gives the same bits. Products
// are summed in another order than in the decode step, and in different orders for different
// numbers of tokens.
//
// A prompt is padded to a number of rows that others share. Short ones would wait for the host to
// launch hundreds of small kernels; so the second prompt with a number of rows captures its layers
// as a CUDA graph, and from then on one launch runs them. Kernels, grids and bits are the same.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cuda/captured_graph.hpp"
#include "backend/cuda/decode/decode_params.hpp"
#include "backend/cuda/device_model.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/prefill/attention.hpp"
#include "backend/cuda/prefill/matrix_product.hpp"
#include "backend/cuda/prefill/prefill_hooks.hpp"
#include "backend/cuda/prefill/row_kernels.hpp"
#include "plan/decode_plan.hpp"
#include "plan/layer_program.hpp"

namespace clusterfusion::cuda {

// What a prompt brings along, in one block of memory.
struct PromptInput {
  PromptExtent* extent = nullptr;
  char** pages = nullptr;
  std::int32_t* tokens = nullptr;  // one for each row
};

class Prefill {
 public:
  // `config` and `weights` outlive this object. Errors: out_of_memory, unsupported.
  Prefill(const ModelConfig& config, const DeviceModel& weights, const plan::KvPlan& kv,
          std::int64_t max_positions);

  // The most tokens that one run() takes.
  std::int64_t max_tokens() const noexcept { return max_tokens_; }

  // Appends `tokens` at `first_position` to the sequence whose keys and values lie in `pages` (one
  // for each kKvPagePositions, enough for the new tokens) and waits for the outputs that are asked
  // for; `output.sampled` is the caller's business. Positions from first_position on may hold
  // anything before. `interventions` may be null; with them, and where activations are asked for,
  // layers go launch by launch. Errors: non_finite (at an asked-for position), those of CUDA.
  void run(std::span<const TokenId> tokens, std::int64_t first_position,
           std::span<char* const> pages, const DeviceInterventions* interventions,
           const PrefillOutput& output, cudaStream_t stream);

  // How many numbers of rows have a graph.
  std::int64_t num_graphs() const noexcept;

 private:
  void send(std::span<const TokenId> tokens, std::span<char* const> pages, cudaStream_t stream);
  void run_layers(cudaStream_t stream);
  void launch_layers(cudaStream_t stream);
  // A stream, and what its steps have for themselves.
  struct Lane {
    cudaStream_t stream;
    MatrixProducts& products;
    float* wide;
  };
  void run_layer(std::int64_t index, cudaStream_t stream);
  void run_steps(const DeviceLayer& layer, cudaStream_t stream);
  void run_step(const plan::Step& step, const DeviceLayer& layer, const Lane& lane);
  void run_product(const plan::Step& step, const DeviceLayer& layer, const Lane& lane);
  void normalise(const DeviceLayer& layer, std::span<const plan::Step> phase, cudaStream_t stream);
  NormParams norm_params(const float* x, std::int64_t rows) const;
  void* narrow_at(plan::Place place) const;
  bool waits_for_mlp(const plan::Step& step) const;
  static void order(cudaStream_t first, cudaStream_t second, cudaEvent_t event);
  bool looks_at(PrefillHooks::Branch branch) const {
    return hooks_ != nullptr && hooks_->look_at_branch(branch, layer_);
  }
  bool ablates_mlp() const { return hooks_ != nullptr && hooks_->ablates_mlp(layer_); }
  void score(std::int64_t first_row, const PrefillOutput& output, cudaStream_t stream);
  void collect_scores(const PrefillOutput& output) const;

  struct Destroy {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
  };
  using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, Destroy>;

  const ModelConfig& config_;
  const DeviceModel& weights_;
  const plan::LayerProgram steps_;
  const std::vector<std::span<const plan::Step>> phases_;  // of steps_
  std::int64_t max_tokens_;
  AttentionKernel attention_kernel_;
  MatrixProducts products_, side_products_;  // each has a workspace
  std::unique_ptr<std::remove_pointer_t<cudaStream_t>, Destroy> side_;
  Event normalised_, mlp_added_;
  std::vector<RowScore> host_scores_;  // of the run in progress
  DeviceMemory memory_;
  PinnedMemory staging_;
  PromptInput staged_;  // in staging_
  // For each number of rows that has been run: its graph, from the second time on.
  std::map<std::int64_t, std::optional<CapturedGraph>> graphs_;
  // All in memory_; rows are tokens.
  PromptInput input_;
  float* x_ = nullptr;          // [hidden]: the residual stream
  void* normed_ = nullptr;      // [hidden], 16-bit: the input of attention
  void* mlp_normed_ = nullptr;  // [hidden], 16-bit: the input of the MLP
  void* heads_ = nullptr;       // [heads, head_dim], 16-bit: queries, then the heads' outputs
  void* active_ = nullptr;      // [intermediate], 16-bit: the MLP's activations
  // Queries, keys and values; or [intermediate], before the activation, and behind all rows of it
  // those of the gate; or [vocab], logits of logit_rows_ rows.
  float* wide_ = nullptr;
  std::int64_t wide_elements_ = 0;
  std::int64_t logit_rows_ = 0;
  std::int32_t* targets_ = nullptr;
  RowScore* scores_ = nullptr;
  // Of the run and the layer in progress.
  const PrefillHooks* hooks_ = nullptr;  // if they have something to do
  std::int64_t layer_ = 0;
  AttentionParams attention_{};
  PromptExtent extent_{};
  std::int64_t rows_ = 0;  // at least the number of tokens
};

}  // namespace clusterfusion::cuda
