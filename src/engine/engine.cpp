#include "clusterfusion/engine.hpp"

#include "base/fail.hpp"
#include "clusterfusion/hub.hpp"
#include "engine/choose_device.hpp"
#include "engine/make_engine.hpp"
#include "engine/open_draft.hpp"
#include "model/intact.hpp"
#include "tokenizer/neighbour_files.hpp"

namespace clusterfusion {
namespace {

BackendOptions check_options(const EngineOptions& options, const ModelConfig& config) {
  require(options.threads >= 0, ErrorKind::invalid_argument,
          "threads must be >= 0 (0: one for each usable core), got {}", options.threads);
  require(options.max_positions >= 0 && options.max_positions <= config.max_positions,
          ErrorKind::invalid_argument,
          "max_positions must be in [1, {}] (the model's max_position_embeddings), or 0 for the "
          "model's, got {}",
          config.max_positions, options.max_positions);
  require(options.max_sequences >= 1, ErrorKind::invalid_argument,
          "max_sequences must be at least 1, got {}", options.max_sequences);
  require(options.kv_bytes >= 0, ErrorKind::invalid_argument,
          "kv_bytes must be >= 0 (0: the device's own choice), got {}", options.kv_bytes);
  check_draft_options(options);
  return {.threads = options.threads,
          .max_positions = options.max_positions,
          .kv_dtype = options.kv_dtype,
          .mode = options.mode,
          .kv_bytes = options.kv_bytes,
          .load_progress = options.load_progress};
}

std::unique_ptr<Engine> open_on(DeviceChoice choice, std::shared_ptr<const Model> model,
                                std::shared_ptr<const Tokenizer> tokenizer,
                                const EngineOptions& options) {
  const BackendOptions backend_options = check_options(options, model->config());
  std::unique_ptr<Backend> backend = make_backend(options.device, choice, model, backend_options);
  require_intact(*model);
  SchedulerOptions scheduling{.max_sequences = options.max_sequences,
                              .prefix_cache = options.prefix_cache,
                              .draft = open_draft(options, choice.device, *model, tokenizer.get()),
                              .draft_tokens = options.draft_tokens};
  return make_engine(model, std::move(tokenizer), std::move(backend), std::move(choice.reason),
                     options.interrupted, std::move(scheduling));
}

}  // namespace

void apply_generation_config(const GenerationConfig& config, GenerateRequest& request) {
  // GenerationConfig of transformers: what generate() takes where nobody says anything.
  constexpr float kTemperature = 1.0f;
  constexpr std::int32_t kTopK = 50;
  constexpr float kTopP = 1.0f;
  SamplingParams& sampling = request.sampling;
  sampling.temperature = config.do_sample ? config.temperature.value_or(kTemperature) : 0.0f;
  if (config.do_sample) {
    sampling.top_k = config.top_k.value_or(kTopK);
    sampling.top_p = config.top_p.value_or(kTopP);
    sampling.min_p = config.min_p.value_or(0.0f);
  }
  sampling.repetition_penalty = config.repetition_penalty.value_or(sampling.repetition_penalty);
  request.max_new_tokens = config.max_new_tokens.value_or(request.max_new_tokens);
}

const char* name_of(FinishReason reason) noexcept {
  switch (reason) {
    case FinishReason::stop_token: return "stop_token";
    case FinishReason::stop_string: return "stop_string";
    case FinishReason::token_limit: return "token_limit";
    case FinishReason::context_limit: return "context_limit";
    case FinishReason::cancelled: return "cancelled";
  }
  return "unknown";
}

std::unique_ptr<Engine> Engine::open(const std::filesystem::path& name,
                                     const EngineOptions& options) {
  DeviceChoice choice = choose_device(options.device);
  const std::filesystem::path path = find_checkpoint(name, options.revision);
  std::shared_ptr<const Model> model = Model::open(path);
  check_options(options, model->config());
  std::shared_ptr<const Tokenizer> tokenizer = open_tokenizer_of(path);
  return open_on(std::move(choice), std::move(model), std::move(tokenizer), options);
}

std::unique_ptr<Engine> Engine::open(std::shared_ptr<const Model> model,
                                     std::shared_ptr<const Tokenizer> tokenizer,
                                     const EngineOptions& options) {
  return open_on(choose_device(options.device), std::move(model), std::move(tokenizer), options);
}

std::vector<GenerateResult> Engine::generate(std::vector<GenerateRequest> requests,
                                             const EventCallback& on_event) {
  const std::unique_ptr<Generation> generation = start(std::move(requests));
  while (const std::optional<GenerateEvent> event = generation->next()) {
    if (on_event && !on_event(*event)) generation->cancel();
  }
  return generation->results();
}

PerplexityResult Engine::perplexity(std::string_view text, bool add_special_tokens,
                                    const PerplexityOptions& options) {
  const std::vector<TokenId> tokens = tokenizer().encode(text, add_special_tokens);
  std::size_t unscored = 0;
  const bool starts_with_text = !add_special_tokens || tokenizer().num_leading_tokens() == 0;
  if (!tokens.empty() && starts_with_text) {
    const std::string_view first = tokenizer().bytes_of(tokens.front());
    // The tokenizer may have put a space before the text.
    unscored = text.starts_with(first) || !first.starts_with(' ') ? first.size() : first.size() - 1;
  }
  const std::size_t scored = text.size() - std::min(text.size(), unscored);
  return perplexity(tokens, static_cast<std::int64_t>(scored), options);
}

GenerateResult Engine::generate(GenerateRequest request, const EventCallback& on_event) {
  require(request.n == 1, ErrorKind::invalid_argument,
          "n is {}, and there is room for one result: pass a list of requests", request.n);
  std::vector<GenerateRequest> requests;
  requests.push_back(std::move(request));
  return std::move(generate(std::move(requests), on_event).front());
}

}  // namespace clusterfusion
