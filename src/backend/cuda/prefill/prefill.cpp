#include "backend/cuda/prefill/prefill.hpp"

#include <algorithm>
#include <bit>

#include "backend/cuda/check.hpp"
#include "backend/sequences.hpp"
#include "base/fail.hpp"
#include "base/round_up.hpp"

namespace clusterfusion::cuda {
namespace {

constexpr std::int64_t kMostTokens = 2048;
// Of activations; with the workspaces of the products and the decode step's scratch this stays
// below 300 MB.
constexpr std::int64_t kActivationBytes = 180'000'000;
constexpr std::int64_t kAlignment = 256;
// Up to here the layers are launched as a graph: longer prompts keep the device busy while the host
// launches. padded() leaves eleven numbers of rows up to here, so there are no more graphs than
// that, each of a few hundred nodes.
constexpr std::int64_t kMostGraphRows = 512;

// Of the MLP's matrices that its input meets.
std::int64_t mlp_columns(const LayerSpec& spec) {
  return spec.intermediate_size + plan::width_of(plan::Place::gate, spec);
}

std::int64_t wide_columns(const LayerSpec& spec) {
  return std::max({spec.qkv_size(), mlp_columns(spec), spec.hidden_size});
}

std::int64_t activation_bytes_per_token(const LayerSpec& spec) {
  return spec.hidden_size * (4 + 2 * 2) + spec.attention_size() * 2 + spec.intermediate_size * 2 +
         wide_columns(spec) * 4;
}

// Products are made for so many rows, so that prompts of similar lengths share cuBLASLt's choice of
// an algorithm, which takes longer to ask for and to load than to run, and a CUDA graph. What the
// rows behind the last token hold reaches no other row.
std::int64_t padded(std::int64_t rows) { return round_up(rows, rows <= 64 ? 16 : 64); }

// Whole tiles of query rows, as many as the memory is meant for and a sequence can hold.
std::int64_t choose_max_tokens(const ModelConfig& config, std::int64_t max_positions) {
  constexpr std::int64_t kTile = 128;
  const std::int64_t fitting = kActivationBytes / activation_bytes_per_token(config);
  return std::min(
      {kMostTokens, std::max(fitting / kTile * kTile, kTile), round_up(max_positions, kTile)});
}

// One after the other, each aligned: counts first, then hands out.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <typename T>
  void place(T*& pointer, std::int64_t bytes) {
    if (base_ != nullptr) pointer = reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(bytes, kAlignment);
  }
  void place(void*& pointer, std::int64_t bytes) {
    char* bytes_pointer = nullptr;
    place(bytes_pointer, bytes);
    pointer = bytes_pointer;
  }
  std::int64_t used() const noexcept { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

// In the same order on the device and in staging memory, the tokens last: then a copy ends with the
// last row.
void place_input(Arena& arena, std::int64_t max_tokens, std::int64_t max_positions,
                 PromptInput& input) {
  arena.place(input.extent, static_cast<std::int64_t>(sizeof(PromptExtent)));
  arena.place(input.pages, kv_pages_of(max_positions) * static_cast<std::int64_t>(sizeof(char*)));
  arena.place(input.tokens, max_tokens * 4);
}

std::int64_t input_bytes(std::int64_t max_tokens, std::int64_t max_positions) {
  Arena arena(nullptr);
  PromptInput nowhere;
  place_input(arena, max_tokens, max_positions, nowhere);
  return arena.used();
}

template <typename T>
void copy_to_device(T* to, std::span<const T> from, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from.data(), from.size_bytes(), cudaMemcpyHostToDevice, stream),
        "sending a prompt");
}

template <typename T>
void copy_to_host(std::span<T> to, const T* from, cudaStream_t stream) {
  check(cudaMemcpyAsync(to.data(), from, to.size_bytes(), cudaMemcpyDeviceToHost, stream),
        "fetching what a prompt gave");
}

// The first row whose logits somebody asks for; `count` if nobody does.
std::int64_t first_asked_row(const PrefillOutput& output, std::int64_t count) {
  if (!output.all_logits.empty()) return 0;
  const auto target = std::find_if(output.targets.begin(), output.targets.end(),
                                   [](TokenId token) { return token >= 0; });
  if (target != output.targets.end()) return target - output.targets.begin();
  return output.last_logits.empty() ? count : count - 1;
}

}  // namespace

Prefill::Prefill(const ModelConfig& config, const DeviceModel& weights, const plan::KvPlan& kv,
                 std::int64_t max_positions)
    : config_(config),
      weights_(weights),
      steps_(plan::mlp_first(plan::make_layer_program(config))),
      phases_(plan::phases_of(steps_)),
      max_tokens_(choose_max_tokens(config, max_positions)),
      attention_kernel_(find_attention_kernel(config.dtype, config.head_dim)),
      products_(config.dtype),
      side_products_(config.dtype),
      host_scores_(static_cast<std::size_t>(max_tokens_)),
      staging_(input_bytes(max_tokens_, max_positions), "prompts") {
  require(config.hidden_size <= kMaxNormWidth, ErrorKind::unsupported,
          "the GPU's prefill handles hidden sizes up to {}, found {}; run this model on the CPU "
          "(device \"cpu\")",
          kMaxNormWidth, config.hidden_size);
  attention_.num_heads = static_cast<std::int32_t>(config.num_heads);
  attention_.heads_per_kv_head = static_cast<std::int32_t>(config.heads_per_kv_head());
  attention_.head_dim = static_cast<std::int32_t>(config.head_dim);
  attention_.cache.head_bytes = static_cast<std::int32_t>(kv.head_bytes);
  attention_.cache.block_bytes = static_cast<std::int32_t>(kv.block_bytes);
  attention_.cache.log2_block = std::countr_zero(static_cast<unsigned>(kv.block_positions));
  wide_elements_ = std::max(max_tokens_ * wide_columns(config), config.vocab_size);
  logit_rows_ = std::min(max_tokens_, wide_elements_ / config.vocab_size);
  cudaStream_t side = nullptr;
  check(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), "creating a stream");
  side_.reset(side);
  for (auto* event : {&normalised_, &mlp_added_}) {
    cudaEvent_t created = nullptr;
    check(cudaEventCreateWithFlags(&created, cudaEventDisableTiming), "creating an event");
    event->reset(created);
  }
  Arena staging(staging_.as<>());
  place_input(staging, max_tokens_, max_positions, staged_);
  const auto place_all = [&](Arena arena) {
    arena.place(x_, max_tokens_ * config.hidden_size * 4);
    arena.place(normed_, max_tokens_ * config.hidden_size * 2);
    arena.place(mlp_normed_, max_tokens_ * config.hidden_size * 2);
    arena.place(heads_, max_tokens_ * config.attention_size() * 2);
    arena.place(active_, max_tokens_ * config.intermediate_size * 2);
    arena.place(wide_, wide_elements_ * 4);
    arena.place(targets_, max_tokens_ * 4);
    arena.place(scores_, max_tokens_ * static_cast<std::int64_t>(sizeof(RowScore)));
    place_input(arena, max_tokens_, max_positions, input_);
    return arena.used();
  };
  const std::int64_t bytes = place_all(Arena(nullptr));
  memory_ = DeviceMemory(bytes, "the activations of a prompt");
  // cuBLASLt's kernels read whole tiles, and initcheck does not see all that they write.
  clear_unless_poisoned(memory_.as<>(), bytes);
  place_all(Arena(memory_.as<>()));
  attention_.query = heads_;
  attention_.cache.pages = input_.pages;
  attention_.extent = input_.extent;
}

std::int64_t Prefill::num_graphs() const noexcept {
  return std::count_if(graphs_.begin(), graphs_.end(),
                       [](const auto& entry) { return entry.second.has_value(); });
}

void Prefill::run(std::span<const TokenId> tokens, std::int64_t first_position,
                  std::span<char* const> pages, const DeviceInterventions* interventions,
                  const PrefillOutput& output, cudaStream_t stream) {
  const auto count = static_cast<std::int64_t>(tokens.size());
  require(count >= 1 && count <= max_tokens_, ErrorKind::internal,
          "prefill: expected 1 to {} tokens, found {}", max_tokens_, count);
  extent_ = {static_cast<std::int32_t>(count), static_cast<std::int32_t>(first_position)};
  rows_ = padded(count);
  attention_.rows = static_cast<std::int32_t>(rows_);
  const PrefillHooks hooks(config_, interventions, output.activations, first_position, count);
  hooks_ = hooks.empty() ? nullptr : &hooks;
  send(tokens, pages, stream);
  run_layers(stream);
  if (hooks_ != nullptr) hooks_->at_final_norm(x_, weights_, stream);
  hooks_ = nullptr;
  score(first_asked_row(output, count), output, stream);
  check(cudaStreamSynchronize(stream), "reading a prompt");
  collect_scores(output);
}

// In one copy; rows behind the last token get token 0. The staging memory is free again because
// run() has waited for the copy before.
void Prefill::send(std::span<const TokenId> tokens, std::span<char* const> pages,
                   cudaStream_t stream) {
  *staged_.extent = extent_;
  std::copy_n(pages.begin(), kv_pages_of(extent_.first_position + extent_.count), staged_.pages);
  std::int32_t* const end = staged_.tokens + rows_;
  std::fill(std::copy(tokens.begin(), tokens.end(), staged_.tokens), end, 0);
  const auto bytes = reinterpret_cast<const char*>(end) - staging_.as<>();
  check(cudaMemcpyAsync(input_.extent, staging_.as<>(), static_cast<std::size_t>(bytes),
                        cudaMemcpyHostToDevice, stream),
        "sending a prompt");
}

// The first prompt with a number of rows goes launch by launch, so that cuBLASLt chooses and loads
// its kernels outside of a capture.
void Prefill::run_layers(cudaStream_t stream) {
  if (hooks_ != nullptr) return launch_layers(stream);
  const auto found = graphs_.find(rows_);
  if (found == graphs_.end()) {
    launch_layers(stream);
    if (rows_ <= kMostGraphRows) graphs_.try_emplace(rows_);
    return;
  }
  std::optional<CapturedGraph>& graph = found->second;
  if (!graph) graph.emplace([this](cudaStream_t captured) { launch_layers(captured); });
  graph->launch(stream);
}

// The embedding and all layers. Nothing in here may depend on more of the prompt than rows_: the
// rest lies in input_.
void Prefill::launch_layers(cudaStream_t stream) {
  launch_embed(config_.dtype, input_.tokens, weights_.embedding(), x_, rows_, config_.hidden_size,
               stream);
  for (std::int64_t layer = 0; layer < config_.num_layers; ++layer) run_layer(layer, stream);
}

void Prefill::run_layer(std::int64_t index, cudaStream_t stream) {
  layer_ = index;
  attention_.cache.layer_offset = index * config_.kv_heads() * attention_.cache.head_bytes;
  if (hooks_ != nullptr) hooks_->before_layer(index, x_, stream);
  run_steps(weights_.layers()[static_cast<std::size_t>(index)], stream);
  if (hooks_ != nullptr) hooks_->after_layer(index, x_, stream);
}

// The MLP of a parallel layer runs beside its attention, in a stream of its own, if there is room
// for both: with few tokens, neither fills the device.
void Prefill::run_steps(const DeviceLayer& layer, cudaStream_t stream) {
  const std::int64_t qkv_elements = rows_ * config_.qkv_size();
  const bool forks = config_.parallel_residual &&
                     qkv_elements + rows_ * mlp_columns(config_) <= wide_elements_ &&
                     !looks_at(PrefillHooks::Branch::mlp) && !ablates_mlp();
  const Lane main{stream, products_, wide_};
  const Lane side{side_.get(), side_products_, wide_ + qkv_elements};
  bool forked = false;
  for (const std::span<const plan::Step> phase : phases_) {
    if (phase[0].operation == plan::Operation::norm) {
      normalise(layer, phase, stream);
      continue;
    }
    for (const plan::Step& step : phase) {
      const bool aside = forks && step.of_mlp;
      if (aside && !forked) order(stream, side_.get(), normalised_.get());
      if (!aside && forked && waits_for_mlp(step)) order(side_.get(), stream, mlp_added_.get());
      forked = forked || aside;
      run_step(step, layer, aside ? side : main);
    }
  }
}

bool Prefill::waits_for_mlp(const plan::Step& step) const {
  for (std::size_t i = 0; i < steps_.size(); ++i)
    if (step.waits_for(i) && steps_[i].of_mlp && steps_[i].operation != plan::Operation::norm)
      return true;
  return false;
}

// What comes in `second` waits for what is in `first`.
void Prefill::order(cudaStream_t first, cudaStream_t second, cudaEvent_t event) {
  check(cudaEventRecord(event, first), "recording an event");
  check(cudaStreamWaitEvent(second, event), "waiting for an event");
}

// One norm of the residual stream or, in one launch, two.
void Prefill::normalise(const DeviceLayer& layer, std::span<const plan::Step> phase,
                        cudaStream_t stream) {
  NormOutput outputs[2];
  for (std::size_t i = 0; i < phase.size(); ++i) {
    const LayerTensor weight = phase[i].weight;
    outputs[i] = {layer[weight], layer[bias_of(weight)], narrow_at(phase[i].output)};
  }
  launch_norm(norm_params(x_, rows_), outputs[0], outputs[1], stream);
}

NormParams Prefill::norm_params(const float* x, std::int64_t rows) const {
  return {config_.dtype, config_.norm,       static_cast<float>(config_.layer_norm_eps), x,
          rows,          config_.hidden_size};
}

// 16-bit rows, as they enter a product.
void* Prefill::narrow_at(plan::Place place) const {
  switch (place) {
    case plan::Place::attention_in: return normed_;
    case plan::Place::mlp_in: return mlp_normed_;
    case plan::Place::heads: return heads_;
    default: return active_;
  }
}

// One that is not a norm.
void Prefill::run_step(const plan::Step& step, const DeviceLayer& layer, const Lane& lane) {
  if (step.operation == plan::Operation::product) return run_product(step, layer, lane);
  const RotaryParams rotary{lane.wide, weights_.rotary(),
                            static_cast<std::int32_t>(config_.rotary_dim)};
  launch_rotary(config_.dtype, rotary, attention_, lane.stream);
  launch_attention(attention_kernel_, attention_, lane.stream);
  if (hooks_ != nullptr) hooks_->at_heads(layer_, heads_, lane.stream);
}

void Prefill::run_product(const plan::Step& step, const DeviceLayer& layer, const Lane& lane) {
  using Branch = PrefillHooks::Branch;
  const bool adds = step.epilogue == plan::Epilogue::add_to_output;
  const Branch branch = step.of_mlp ? Branch::mlp : Branch::attention;
  if (step.of_mlp && ablates_mlp()) {
    if (adds) hooks_->at_branch(branch, layer_, nullptr, lane.stream);
    return;
  }
  const std::int64_t inner = config_.intermediate_size;
  float* const gate = lane.wide + rows_ * inner;
  // A hook looks at what is added; by then nobody reads lane.wide any more.
  const bool apart = adds && looks_at(branch);
  lane.products.multiply({.x = narrow_at(step.input),
                          .weight = layer[step.weight],
                          .bias = reinterpret_cast<const float*>(layer[bias_of(step.weight)]),
                          .y = adds && !apart                     ? x_
                               : step.output == plan::Place::gate ? gate
                                                                  : lane.wide,
                          .rows = rows_,
                          .in = plan::width_of(step.input, config_),
                          .out = plan::width_of(step.output, config_),
                          .accumulate = adds && !apart},
                         lane.stream);
  if (apart) {
    hooks_->at_branch(branch, layer_, lane.wide, lane.stream);
    launch_add(x_, lane.wide, extent_.count * config_.hidden_size, lane.stream);
  }
  // The gate's activation is taken where it is multiplied.
  if (step.output != plan::Place::mlp) return;
  const bool gated = step.epilogue == plan::Epilogue::times_gate;
  launch_activation(config_.dtype, config_.activation, gated ? gate : lane.wide,
                    gated ? lane.wide : nullptr, active_, rows_ * inner, lane.stream);
}

// Final norm and LM head from `first_row` on, in slices whose logits fit into wide_.
void Prefill::score(std::int64_t first_row, const PrefillOutput& output, cudaStream_t stream) {
  const std::int64_t hidden = config_.hidden_size;
  const std::int64_t vocab = config_.vocab_size;
  const std::int64_t count = extent_.count;
  if (first_row == count) return;
  launch_norm(norm_params(x_ + first_row * hidden, count - first_row),
              {weights_.final_norm_weight(), weights_.final_norm_bias(), normed_}, {}, stream);
  // Rows without a target are scored as well, against none.
  std::vector<TokenId> targets(static_cast<std::size_t>(count), -1);
  std::copy(output.targets.begin(), output.targets.end(), targets.begin());
  copy_to_device<TokenId>(targets_, targets, stream);
  for (std::int64_t row = first_row; row < count; row += logit_rows_) {
    const std::int64_t rows = std::min(logit_rows_, count - row);
    // One row is asked for so often that it has a product of its own.
    const std::int64_t product_rows =
        rows == 1 ? 1 : std::min({padded(rows), logit_rows_, max_tokens_ - (row - first_row)});
    products_.multiply({.x = static_cast<char*>(normed_) + (row - first_row) * hidden * 2,
                        .weight = weights_.lm_head(),
                        .y = wide_,
                        .rows = product_rows,
                        .in = hidden,
                        .out = vocab},
                       stream);
    launch_score(wide_, targets_ + row, scores_ + row, rows, vocab, stream);
    if (!output.all_logits.empty())
      copy_to_host(output.all_logits.subspan(row * vocab, rows * vocab), wide_, stream);
    if (!output.last_logits.empty() && row + rows == count)
      copy_to_host(output.last_logits, wide_ + (rows - 1) * vocab, stream);
  }
  copy_to_host(std::span(host_scores_).subspan(first_row, count - first_row), scores_ + first_row,
               stream);
}

void Prefill::collect_scores(const PrefillOutput& output) const {
  const std::int64_t count = extent_.count;
  for (std::int64_t row = first_asked_row(output, count); row < count; ++row) {
    const RowScore& score = host_scores_[row];
    const bool has_target = !output.targets.empty() && output.targets[row] >= 0;
    const bool asked = has_target || !output.all_logits.empty() ||
                       (!output.last_logits.empty() && row + 1 == count);
    require(!asked || score.all_finite, ErrorKind::non_finite,
            "the logits after position {} are not finite: the checkpoint holds NaN or infinity, or "
            "an activation overflowed",
            extent_.first_position + row);
    if (has_target) output.target_logprobs[row] = score.target_logprob;
  }
}

}  // namespace clusterfusion::cuda
