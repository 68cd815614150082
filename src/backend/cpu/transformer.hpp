// The forward pass of a model on the CPU: it walks the program of a layer.
#pragma once

#include <hwy/aligned_allocator.h>

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/cpu/kernels.hpp"
#include "backend/cpu/kv_pool.hpp"
#include "backend/cpu/layer_hooks.hpp"
#include "base/thread_pool.hpp"
#include "clusterfusion/model.hpp"
#include "plan/layer_program.hpp"
#include "plan/rotary_table.hpp"

namespace clusterfusion::cpu {

// Tokens that follow each other in one sequence.
struct Segment {
  std::span<const TokenId> tokens;
  std::int64_t first_position = 0;
  std::span<std::byte* const> pages;  // enough for first_position + tokens.size() positions
  const Interventions* interventions = nullptr;  // of its sequence, or none
  std::span<const ActivationOutput> activations = {};
};

class Transformer {
 public:
  // `pool` gives the layout of pages. Model, pool and threads must outlive this.
  Transformer(const Model& model, const KvPool& pool, ThreadPool& threads);

  // The most tokens that run() takes at once; bounded so that activations stay small.
  std::int64_t max_rows() const noexcept { return max_rows_; }

  // Runs all layers for the segments' tokens (max_rows() in all), of different sequences, and puts
  // keys and values into the pages. The rows of the result are the tokens in order.
  void run(std::span<const Segment> segments);

  // Logits of these rows of the last run, float32 [rows.size(), vocab_size].
  void logits(std::span<const std::int64_t> rows, float* out);

 private:
  // Row-major float32 with a stride that is a multiple of 16, the padding of each row zero.
  struct Activations {
    hwy::AlignedFreeUniquePtr<float[]> data;
    std::int64_t stride = 0;
    std::int64_t rows = 0;
    float* row(std::int64_t r) const noexcept { return data.get() + r * stride; }
    HookedRows hooked() const noexcept { return {data.get(), stride}; }
  };
  // By LayerTensor: matrices in place, vectors in float32; empty where the layer has none.
  struct Layer {
    std::array<Matrix, kNumLayerTensors> matrices;
    std::array<std::vector<float>, kNumLayerTensors> vectors;
  };
  struct JobStep {
    Product product;
    plan::Epilogue epilogue = plan::Epilogue::none;
  };
  // Products of one parallel region. All of a job have the same rows, and each may take up, row by
  // row, what the one before it gave.
  struct Job {
    std::vector<JobStep> steps;

    std::int64_t tokens() const noexcept { return steps[0].product.tokens; }
    std::int64_t rows() const noexcept { return steps[0].product.weights.rows; }
    std::int64_t row_bytes() const noexcept;  // of weights, over all steps
  };
  // Rows and tokens of a job that one thread computes.
  struct Task {
    const Job* job;
    std::int64_t row, row_end, token, token_end;
  };

  void reserve(std::int64_t rows);
  void reserve(Activations& activations, std::int64_t rows);
  void embed(std::span<const Segment> segments);
  // A row of the residual stream.
  void normalize_row(std::span<const float> weight, std::span<const float> bias, std::int64_t row,
                     float* out);
  void normalize(std::span<const float> weight, std::span<const float> bias, Activations& out);
  void run_products(std::int64_t layer, std::span<const plan::Step> phase);
  void multiply_all(std::span<const Job> jobs);
  std::vector<Task> streaming_tasks(std::span<const Job> jobs) const;
  std::vector<Task> tiled_tasks(std::span<const Job> jobs) const;
  void compute(const Task& task) const;
  Product product(const Layer& layer, const plan::Step& step) const;
  void attention(std::span<const Segment> segments, std::int64_t layer);
  // Of a head, or a head of keys and values, in a row.
  float* query(std::int64_t row, std::int64_t head) const noexcept;
  float* key(std::int64_t row, std::int64_t kv_head) const noexcept;
  float* value(std::int64_t row, std::int64_t kv_head) const noexcept;
  float* qkv_part(std::int64_t row, std::int64_t kv_head, std::int64_t part) const noexcept;
  // Normalises, if the model does so, and rotates a query or key.
  void prepare(float* head, LayerTensor norm, std::int64_t row, std::int64_t layer, int thread);
  void store_head(const Segment& segment, std::int64_t row, std::int64_t count, std::int64_t layer,
                  std::int64_t kv_head, int thread);
  void attend_head(const Segment& segment, std::int64_t row, std::int64_t begin, std::int64_t end,
                   std::int64_t layer, std::int64_t head, int thread);
  void run_layer(std::span<const Segment> segments, std::int64_t index);
  void add_branch(Product product, LayerHooks::Branch branch, std::int64_t layer);
  void hook(std::span<const Segment> segments);
  void hand_out_final_norm();

  Activations& at(plan::Place place) noexcept { return at_[static_cast<std::size_t>(place)]; }
  bool is_separate() const noexcept { return config_.qkv_layout == QkvLayout::separate; }
  const Activations& at(plan::Place place) const noexcept {
    return at_[static_cast<std::size_t>(place)];
  }

  const ModelConfig& config_;
  const KvPool& pool_;
  ThreadPool& threads_;
  const plan::LayerProgram program_;
  const std::vector<std::span<const plan::Step>> phases_;  // of program_
  plan::RotaryTable rotary_;
  Matrix embedding_, lm_head_;
  std::vector<float> final_norm_weight_, final_norm_bias_;
  std::vector<Layer> layers_;
  std::int64_t max_rows_ = 0;
  std::int64_t rows_ = 0;  // of the last run

  std::array<Activations, plan::kNumPlaces> at_;  // by plan::Place
  Activations cos_sin_;
  LayerHooks hooks_;
  Activations branch_;  // what attention or the MLP gives, where a hook looks at it
  std::vector<std::int64_t> positions_;
  std::vector<std::vector<float>> attention_scratch_;  // one for each thread
};

}  // namespace clusterfusion::cpu
