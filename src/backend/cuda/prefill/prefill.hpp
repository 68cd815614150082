// Prompts as matrix-matrix work: many tokens, of one sequence or of several, through all layers at
// once.
//
// Numbers: the residual stream, norms, softmax and all sums are float32; activations are rounded to
// the weights' type as they enter a product; but queries, keys and values are not if the KV cache
// is float32 (KvPlan::dtype). What is computed of a token depends on the tokens up to it alone, bit
// for bit: not on the piece of the prompt that it comes with, nor on other prompts of the same
// pass. Products are summed in another order than in the decode step.
//
// A pass is padded to a number of rows that others share. Short ones would wait for the host to
// launch hundreds of small kernels; so the second pass of one prompt with a number of rows captures
// its layers as a CUDA graph, and from then on one launch runs them. Kernels and bits are the same.
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
#include "backend/cuda/prefill/prompt_input.hpp"
#include "backend/cuda/prefill/row_kernels.hpp"
#include "plan/decode_plan.hpp"
#include "plan/layer_program.hpp"

namespace clusterfusion::cuda {

class Prefill {
 public:
  // `config` and `weights` outlive this object. `budget`: for activations, in bytes. Errors:
  // out_of_memory, unsupported.
  Prefill(const ModelConfig& config, const DeviceModel& weights, const plan::KvPlan& kv,
          std::int64_t max_positions, std::int64_t budget);

  // The most tokens that one run() takes.
  std::int64_t max_tokens() const noexcept { return input_.max_rows(); }
  // Whether one run() takes them.
  bool fits(const PromptNeed& need) const noexcept { return input_.fits(need); }

  // Appends the tokens of pieces, each to its own sequence, and waits for the outputs that are
  // asked for; PrefillOutput::sampled is the caller's business. A piece with interventions, or
  // whose activations somebody asks for, comes alone. Errors: non_finite (at an asked-for
  // position), those of CUDA.
  void run(std::span<const PromptPiece> pieces, cudaStream_t stream);

  // How many numbers of rows have a graph.
  std::int64_t num_graphs() const noexcept;

 private:
  // A stream, and what its steps have for themselves.
  struct Lane {
    cudaStream_t stream;
    float* wide;
  };
  void place_memory(std::int64_t max_tokens);
  void run_layers(bool as_graph, cudaStream_t stream);
  void launch_layers(cudaStream_t stream);
  void run_layer(std::int64_t index, cudaStream_t stream);
  void run_steps(const DeviceLayer& layer, cudaStream_t stream);
  void run_step(const plan::Step& step, const DeviceLayer& layer, const Lane& lane);
  void run_product(const plan::Step& step, const DeviceLayer& layer, const Lane& lane);
  void normalise(const DeviceLayer& layer, std::span<const plan::Step> phase, cudaStream_t stream);
  NormParams norm_params(std::int64_t rows) const;
  void* narrow_at(plan::Place place) const;
  bool waits_for_mlp(const plan::Step& step) const;
  static void order(cudaStream_t first, cudaStream_t second, cudaEvent_t event);
  bool looks_at(PrefillHooks::Branch branch) const {
    return hooks_ != nullptr && hooks_->look_at_branch(branch, layer_);
  }
  bool ablates_mlp() const { return hooks_ != nullptr && hooks_->ablates_mlp(layer_); }
  void score(std::span<const PromptPiece> pieces, cudaStream_t stream);
  void fetch_logits(std::span<const PromptPiece> pieces, std::size_t first, std::size_t count,
                    cudaStream_t stream);
  void collect_scores(std::span<const PromptPiece> pieces) const;

  struct Destroy {
    void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
    void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
  };
  using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, Destroy>;

  // A row whose logits somebody asks for.
  struct AskedRow {
    std::size_t piece;
    std::int64_t token;  // of the piece
  };

  const ModelConfig& config_;
  const DeviceModel& weights_;
  const plan::LayerProgram steps_;
  const std::vector<std::span<const plan::Step>> phases_;  // of steps_
  AttentionKernel attention_kernel_;
  MatrixProducts products_;
  std::unique_ptr<std::remove_pointer_t<cudaStream_t>, Destroy> side_;
  Event normalised_, mlp_added_;
  PromptInputs input_;
  DeviceMemory memory_;
  // For each number of rows that has been run: its graph, from the second time on.
  std::map<std::int64_t, std::optional<CapturedGraph>> graphs_;
  // All in memory_; rows are tokens.
  float* x_ = nullptr;          // [hidden]: the residual stream
  void* normed_ = nullptr;      // [hidden], 16-bit: the input of attention, or of the LM head
  void* mlp_normed_ = nullptr;  // [hidden], 16-bit: the input of the MLP
  void* heads_ = nullptr;       // [heads, head_dim], 16-bit: queries, then the heads' outputs;
                                // beside a float32 KV cache outputs alone
  void* active_ = nullptr;      // [intermediate], 16-bit: the MLP's activations
  // Queries, keys and values, and behind all rows of them, or in their place, the gate; or what a
  // branch adds; or [vocab], logits of logit_rows_ rows.
  float* wide_ = nullptr;
  std::int64_t wide_elements_ = 0;
  std::int64_t logit_rows_ = 0;
  std::int32_t* asked_rows_ = nullptr;
  std::int32_t* targets_ = nullptr;
  RowScore* scores_ = nullptr;
  // Of the run and the layer in progress.
  std::vector<AskedRow> asked_;
  std::vector<RowScore> host_scores_;    // of asked_
  const PrefillHooks* hooks_ = nullptr;  // if they have something to do
  std::int64_t layer_ = 0;
  AttentionParams attention_{};
  std::int64_t count_ = 0;  // of tokens
  std::int64_t rows_ = 0;   // at least as many
};

}  // namespace clusterfusion::cuda
