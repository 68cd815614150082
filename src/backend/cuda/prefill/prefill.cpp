#include "backend/cuda/prefill/prefill.hpp"

#include <algorithm>
#include <bit>

#include "backend/cuda/check.hpp"
#include "backend/sequences.hpp"
#include "base/fail.hpp"
#include "base/round_up.hpp"

namespace clusterfusion::cuda {
namespace {

// More rows would hardly be quicker for it.
constexpr std::int64_t kMostTokens = 8192;
// Up to here the layers are launched as a graph: longer prompts keep the device busy while the host
// launches. padded() leaves eleven numbers of rows up to here, so there are no more graphs than
// that, each of a few hundred nodes.
constexpr std::int64_t kMostGraphRows = 512;
constexpr std::int64_t kMostForkedRows = 256;

// Of the MLP's matrices that its input meets, as far as they are kept in float32.
std::int64_t gate_columns(const LayerSpec& spec) { return plan::width_of(plan::Place::gate, spec); }

std::int64_t wide_columns(const LayerSpec& spec) {
  return std::max(spec.qkv_size() + gate_columns(spec), spec.hidden_size);
}

// Queries that are not rounded have a place of their own.
std::int64_t query_bytes(const LayerSpec& spec, DType kv_dtype) {
  return kv_dtype == DType::float32 ? spec.attention_size() * 4 : 0;
}

std::int64_t activation_bytes_per_token(const LayerSpec& spec, DType kv_dtype) {
  return spec.hidden_size * (4 + 2 * 2) + spec.attention_size() * 2 + spec.intermediate_size * 2 +
         wide_columns(spec) * 4 + query_bytes(spec, kv_dtype);
}

// What the rows behind the last token hold reaches no other row.
std::int64_t padded(std::int64_t rows) { return round_up(rows, rows <= 64 ? 16 : 64); }

// Whole tiles of rows, as many as the memory is meant for.
std::int64_t choose_max_tokens(const ModelConfig& config, DType kv_dtype, std::int64_t budget) {
  constexpr std::int64_t kTile = 128;
  const std::int64_t fitting = budget / activation_bytes_per_token(config, kv_dtype);
  return std::clamp(fitting / kTile * kTile, kTile, kMostTokens);
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

// Whether somebody asks for the logits behind a token, and so for their being finite.
bool is_asked(const PromptPiece& piece, std::int64_t token) {
  const PrefillOutput& output = *piece.output;
  return !output.all_logits.empty() || (!output.targets.empty() && output.targets[token] >= 0) ||
         (!output.last_logits.empty() && token + 1 == piece.count());
}

}  // namespace

Prefill::Prefill(const ModelConfig& config, const DeviceModel& weights, const plan::KvPlan& kv,
                 std::int64_t max_positions, std::int64_t budget)
    : config_(config),
      weights_(weights),
      steps_(plan::mlp_first(plan::make_layer_program(config))),
      phases_(plan::phases_of(steps_)),
      attention_kernel_(find_attention_kernel(config.dtype, kv.dtype, config.head_dim)),
      products_(config.dtype, config.activation),
      input_(choose_max_tokens(config, kv.dtype, budget), max_positions,
             attention_kernel_.query_rows) {
  require(config.hidden_size <= kMaxNormWidth, ErrorKind::unsupported,
          "the GPU's prefill handles hidden sizes up to {}, found {}; run this model on the CPU "
          "(device \"cpu\")",
          kMaxNormWidth, config.hidden_size);
  attention_.num_heads = static_cast<std::int32_t>(config.num_heads);
  attention_.heads_per_kv_head = static_cast<std::int32_t>(config.heads_per_kv_head());
  attention_.head_dim = static_cast<std::int32_t>(config.head_dim);
  attention_.cache.head_bytes = static_cast<std::int32_t>(kv.head_bytes);
  attention_.cache.block_bytes = static_cast<std::int32_t>(kv.block_bytes);
  attention_.cache.dtype = kv.dtype;
  attention_.cache.log2_block = std::countr_zero(static_cast<unsigned>(kv.block_positions));
  cudaStream_t side = nullptr;
  check(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), "creating a stream");
  side_.reset(side);
  for (auto* event : {&normalised_, &mlp_added_}) {
    cudaEvent_t created = nullptr;
    check(cudaEventCreateWithFlags(&created, cudaEventDisableTiming), "creating an event");
    event->reset(created);
  }
  place_memory(input_.max_rows());
}

void Prefill::place_memory(std::int64_t max_tokens) {
  wide_elements_ = std::max(max_tokens * wide_columns(config_), config_.vocab_size);
  logit_rows_ = std::min(max_tokens, wide_elements_ / config_.vocab_size);
  const auto place_all = [&](ScratchArena arena) {
    arena.place(x_, max_tokens * config_.hidden_size * 4);
    arena.place(normed_, max_tokens * config_.hidden_size * 2);
    arena.place(mlp_normed_, max_tokens * config_.hidden_size * 2);
    arena.place(heads_, max_tokens * config_.attention_size() * 2);
    if (const std::int64_t bytes = query_bytes(config_, attention_.cache.dtype); bytes > 0)
      arena.place(attention_.query, max_tokens * bytes);
    arena.place(active_, max_tokens * config_.intermediate_size * 2);
    arena.place(wide_, wide_elements_ * 4);
    arena.place(asked_rows_, max_tokens * 4);
    arena.place(targets_, max_tokens * 4);
    arena.place(scores_, max_tokens * static_cast<std::int64_t>(sizeof(RowScore)));
    return arena.used();
  };
  const std::int64_t bytes = place_all(ScratchArena(nullptr));
  memory_ = DeviceMemory(bytes, "the activations of a prompt");
  // Products read whole tiles of rows, and initcheck does not see all that they write.
  clear_unless_poisoned(memory_.as<>(), bytes);
  place_all(ScratchArena(memory_.as<>()));
  attention_.heads = heads_;
  if (attention_.query == nullptr) attention_.query = heads_;
  attention_.cache.pages = input_.pages();
  attention_.tiles = input_.tiles();
}

std::int64_t Prefill::num_graphs() const noexcept {
  return std::count_if(graphs_.begin(), graphs_.end(),
                       [](const auto& entry) { return entry.second.has_value(); });
}

void Prefill::run(std::span<const PromptPiece> pieces, cudaStream_t stream) {
  PromptNeed need;
  for (const PromptPiece& piece : pieces) need.add(piece);
  require(!pieces.empty() && input_.fits(need), ErrorKind::internal,
          "prefill: expected 1 to {} tokens and what pages they need, found {} pieces",
          max_tokens(), pieces.size());
  count_ = need.rows;
  rows_ = std::min(padded(count_), max_tokens());
  input_.send(pieces, rows_, stream);
  attention_.num_tiles = input_.num_tiles();
  const PromptPiece& first = pieces.front();
  const PrefillHooks hooks(config_, first.interventions, first.output->activations,
                           first.first_position, first.count());
  require(hooks.empty() || pieces.size() == 1, ErrorKind::internal,
          "prefill: interventions and activations are those of one piece, found {}", pieces.size());
  hooks_ = hooks.empty() ? nullptr : &hooks;
  run_layers(pieces.size() == 1 && rows_ <= kMostGraphRows, stream);
  if (hooks_ != nullptr) hooks_->at_final_norm(x_, weights_, stream);
  hooks_ = nullptr;
  score(pieces, stream);
  check(cudaStreamSynchronize(stream), "reading a prompt");
  collect_scores(pieces);
}

// The first prompt with a number of rows goes launch by launch: what CUDA loads with a kernel's
// first launch, it does not load in a capture.
void Prefill::run_layers(bool as_graph, cudaStream_t stream) {
  if (hooks_ != nullptr || !as_graph) return launch_layers(stream);
  const auto [entry, is_new] = graphs_.try_emplace(rows_);
  if (is_new) return launch_layers(stream);
  std::optional<CapturedGraph>& graph = entry->second;
  if (!graph) graph.emplace([this](cudaStream_t captured) { launch_layers(captured); });
  graph->launch(stream);
}

// The embedding and all layers. Nothing in here may depend on more of the prompt than rows_: the
// rest lies in input_.
void Prefill::launch_layers(cudaStream_t stream) {
  launch_embed(config_.dtype, input_.rows(), weights_.embedding(), x_, rows_, config_.hidden_size,
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

// The MLP of a parallel layer runs beside its attention, in a stream of its own, if there are few
// tokens: neither fills the device. What a branch adds comes after what the other one adds.
void Prefill::run_steps(const DeviceLayer& layer, cudaStream_t stream) {
  const bool forks = rows_ <= kMostForkedRows && config_.parallel_residual &&
                     !looks_at(PrefillHooks::Branch::mlp) && !ablates_mlp();
  const Lane main{stream, wide_};
  const Lane side{side_.get(), wide_ + rows_ * config_.qkv_size()};
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
  launch_norm(norm_params(rows_), outputs[0], outputs[1], stream);
}

NormParams Prefill::norm_params(std::int64_t rows) const {
  return {config_.dtype, config_.norm,       static_cast<float>(config_.layer_norm_eps), x_,
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
                            static_cast<std::int32_t>(config_.rotary_dim), input_.rows(),
                            static_cast<std::int32_t>(rows_)};
  const HeadNorms norms{layer[LayerTensor::query_norm_weight], layer[LayerTensor::key_norm_weight],
                        static_cast<float>(config_.layer_norm_eps)};
  launch_rotary(config_.dtype, rotary, norms, attention_, lane.stream);
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
  // A hook looks at what is added; by then nobody reads lane.wide any more.
  const bool apart = adds && looks_at(branch);
  Product product{.x = narrow_at(step.input),
                  .weight = layer[step.weight],
                  .bias = reinterpret_cast<const float*>(layer[bias_of(step.weight)]),
                  .gate = lane.wide,
                  .y = lane.wide,
                  .rows = rows_,
                  .in = plan::width_of(step.input, config_),
                  .out = plan::width_of(step.output, config_)};
  if (adds && !apart) {
    product.epilogue = ProductEpilogue::add;
    product.y = x_;
  } else if (step.output == plan::Place::mlp) {
    // The gate's activation is taken where it is multiplied.
    product.epilogue = step.epilogue == plan::Epilogue::times_gate ? ProductEpilogue::times_gate
                                                                   : ProductEpilogue::activate;
    product.y = active_;
  }
  products_.multiply(product, lane.stream);
  if (!apart) return;
  hooks_->at_branch(branch, layer_, lane.wide, lane.stream);
  launch_add(x_, lane.wide, count_ * config_.hidden_size, lane.stream);
}

// Final norm and LM head of the rows whose logits somebody asks for, in slices whose logits fit
// into wide_.
void Prefill::score(std::span<const PromptPiece> pieces, cudaStream_t stream) {
  std::vector<std::int32_t> rows, targets;
  std::int32_t row = 0;
  asked_.clear();
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const PrefillOutput& output = *pieces[i].output;
    for (std::int64_t token = 0; token < pieces[i].count(); ++token, ++row) {
      if (!is_asked(pieces[i], token)) continue;
      asked_.push_back({i, token});
      rows.push_back(row);
      targets.push_back(output.targets.empty() ? -1 : output.targets[token]);
    }
  }
  host_scores_.resize(asked_.size());
  if (asked_.empty()) return;
  copy_to_device<std::int32_t>(asked_rows_, rows, stream);
  copy_to_device<std::int32_t>(targets_, targets, stream);
  NormParams norm = norm_params(std::ssize(rows));
  norm.rows = asked_rows_;
  launch_norm(norm, {weights_.final_norm_weight(), weights_.final_norm_bias(), normed_}, {},
              stream);
  const std::int64_t hidden = config_.hidden_size, vocab = config_.vocab_size;
  for (std::int64_t first = 0; first < std::ssize(rows); first += logit_rows_) {
    const std::int64_t count = std::min(logit_rows_, std::ssize(rows) - first);
    products_.multiply({.x = static_cast<char*>(normed_) + first * hidden * 2,
                        .weight = weights_.lm_head(),
                        .y = wide_,
                        .rows = count,
                        .in = hidden,
                        .out = vocab},
                       stream);
    launch_score(wide_, targets_ + first, scores_ + first, count, vocab, stream);
    fetch_logits(pieces, static_cast<std::size_t>(first), static_cast<std::size_t>(count), stream);
  }
  copy_to_host(std::span(host_scores_), scores_, stream);
}

// Of the slice of asked_ whose logits are in wide_, those that somebody wants to have.
void Prefill::fetch_logits(std::span<const PromptPiece> pieces, std::size_t first,
                           std::size_t count, cudaStream_t stream) {
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  for (std::size_t i = 0; i < count; ++i) {
    const auto [number, token] = asked_[first + i];
    const PromptPiece& piece = pieces[number];
    const PrefillOutput& output = *piece.output;
    const float* const logits = wide_ + i * vocab;
    if (!output.last_logits.empty() && token + 1 == piece.count())
      copy_to_host(output.last_logits, logits, stream);
    // Rows of one piece follow each other.
    if (output.all_logits.empty() || (i > 0 && asked_[first + i - 1].piece == number)) continue;
    const auto rows = std::min(count - i, static_cast<std::size_t>(piece.count() - token));
    copy_to_host(output.all_logits.subspan(static_cast<std::size_t>(token) * vocab, rows * vocab),
                 logits, stream);
  }
}

void Prefill::collect_scores(std::span<const PromptPiece> pieces) const {
  for (std::size_t i = 0; i < asked_.size(); ++i) {
    const auto [number, token] = asked_[i];
    const PrefillOutput& output = *pieces[number].output;
    require(host_scores_[i].all_finite, ErrorKind::non_finite,
            "the logits after position {} are not finite: the checkpoint holds NaN or infinity, or "
            "an activation overflowed",
            pieces[number].first_position + token);
    if (output.targets.empty() || output.targets[token] < 0) continue;
    output.target_logprobs[token] = host_scores_[i].target_logprob;
    if (!output.target_is_likeliest.empty())
      output.target_is_likeliest[token] = host_scores_[i].target_is_likeliest;
  }
}

}  // namespace clusterfusion::cuda
