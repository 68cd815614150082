#include "engine/make_engine.hpp"

#include <algorithm>
#include <iterator>

#include "base/fail.hpp"
#include "engine/generation.hpp"
#include "engine/hidden_states.hpp"
#include "engine/prepare_request.hpp"
#include "engine/prompt_cache.hpp"
#include "engine/scheduler.hpp"
#include "engine/scoring.hpp"
#include "engine/shared_backend.hpp"
#include "engine/timing.hpp"
#include "io/json.hpp"
#include "tokenizer/neighbour_files.hpp"

namespace clusterfusion {
namespace {

// An error of one request among several says which.
PreparedRequest prepare_numbered(GenerateRequest request, const RequestLimits& limits,
                                 std::size_t index, std::size_t count) {
  try {
    return prepare_request(std::move(request), limits);
  } catch (const Error& error) {
    if (count == 1) throw;
    fail(error.kind(), "requests[{}]: {}", index, error.what());
  }
}

// A sample of a prompt: its seed is the request's plus its number.
BatchGeneration::Request sample_of(const PreparedRequest& prepared, std::size_t prompt_number,
                                   std::int32_t sample) {
  BatchGeneration::Request request{prepared, prompt_number};
  request.prepared.sampling.seed += static_cast<std::uint64_t>(sample);
  return request;
}

// A draft for a device that has no use for it.
std::vector<std::string> draft_warnings(const BackendInfo& info, const Draft* draft) {
  if (draft == nullptr || info.verify_rows > 1) return {};
  return {fmt::format(
      "the draft {} is not used: device \"{}\" computes one token of a text in a step as it is "
      "set up; on a GPU, mode \"throughput\" computes several",
      draft->name(), info.name)};
}

std::vector<std::string> warnings_of(const Model& model, const Tokenizer* tokenizer) {
  std::vector<std::string> warnings = model.warnings();
  if (tokenizer == nullptr) return warnings;
  warnings.insert(warnings.end(), tokenizer->warnings().begin(), tokenizer->warnings().end());
  const std::int64_t vocab_size = model.config().vocab_size;
  if (tokenizer->vocab_size() > vocab_size) {
    warnings.push_back(fmt::format(
        "{}: the tokenizer has ids up to {}, and the model's vocab_size is {}: text with {} ({}) "
        "will be refused. Resize the model's embeddings, or fetch tokenizer.json and config.json "
        "from the same checkpoint",
        model.folder().string(), tokenizer->vocab_size() - 1, vocab_size,
        quote(tokenizer->id_to_token(static_cast<TokenId>(vocab_size))),
        tokenizer->vocab_size() - vocab_size == 1 ? "the only such token"
                                                  : "the first such token"));
  }
  return warnings;
}

class BackendEngine final : public Engine {
 public:
  BackendEngine(std::shared_ptr<const Model> model, std::shared_ptr<const Tokenizer> tokenizer,
                std::unique_ptr<Backend> backend, std::string device_reason,
                SchedulerOptions scheduling, StopRequest interrupted)
      : model_(std::move(model)),
        tokenizer_(std::move(tokenizer)),
        device_reason_(std::move(device_reason)),
        warnings_(warnings_of(*model_, tokenizer_.get())),
        draft_name_(scheduling.draft == nullptr ? "" : scheduling.draft->name()),
        backend_(
            std::make_shared<SharedBackend>(model_, std::move(backend), std::move(interrupted))),
        scheduler_(make_scheduler(std::move(scheduling))),
        prompt_cache_(*backend_, *scheduler_) {}

  const Model& model() const noexcept override { return *model_; }
  bool has_tokenizer() const noexcept override { return tokenizer_ != nullptr; }
  const Tokenizer& tokenizer() const override {
    if (!has_tokenizer()) fail_no_tokenizer(model_->folder());
    return *tokenizer_;
  }
  const std::vector<std::string>& warnings() const noexcept override { return warnings_; }
  EngineInfo info() const override {
    const BackendInfo& info = backend_->info();
    return {.device = info.name,
            .device_description = info.device,
            .device_reason = device_reason_,
            .kv_dtype = info.kv_dtype,
            .kv_bytes_per_position = info.kv_bytes_per_position,
            .max_positions = info.max_positions,
            .kv_bytes = info.kv_pages * kKvPagePositions * info.kv_bytes_per_position,
            .draft = draft_name_};
  }

  std::unique_ptr<Generation> start(std::vector<GenerateRequest> requests,
                                    std::function<void()> on_news) override {
    const BackendInfo& info = backend_->info();
    const RequestLimits limits{*model_, tokenizer_.get(), info.max_positions, info.kv_pages};
    std::vector<BatchGeneration::Request> samples;
    for (std::size_t i = 0; i < requests.size(); ++i) {
      const std::int32_t n = requests[i].n;
      const PreparedRequest prepared =
          prepare_numbered(std::move(requests[i]), limits, i, requests.size());
      for (std::int32_t sample = 0; sample < n; ++sample) {
        samples.push_back(sample_of(prepared, i, sample));
      }
    }
    return std::make_unique<BatchGeneration>(backend_, scheduler_, tokenizer_, std::move(samples),
                                             std::move(on_news));
  }
  ServingStatistics serving_statistics() const override { return scheduler_->statistics(); }
  std::int64_t save_prompt_cache(std::span<const TokenId> prompt,
                                 const std::filesystem::path& file) override {
    return prompt_cache_.save(*this, prompt, file);
  }
  std::int64_t load_prompt_cache(const std::filesystem::path& file,
                                 std::span<const TokenId> prompt) override {
    return prompt_cache_.load(file, prompt);
  }

  void logits(std::span<const TokenId> tokens, std::span<float> logits) override {
    compute_logits(*backend_, tokens, logits);
  }
  ScoreResult score(std::span<const TokenId> tokens) override {
    return compute_score(*backend_, tokens);
  }
  std::vector<ScoreResult> score(std::span<const std::vector<TokenId>> texts) override {
    return compute_scores(*backend_, texts);
  }
  std::vector<LoglikelihoodResult> loglikelihood(std::span<const LoglikelihoodRequest> requests,
                                                 const LoglikelihoodOptions& options) override {
    return compute_loglikelihoods(*backend_, requests, options);
  }
  PerplexityResult perplexity(std::span<const TokenId> tokens, std::int64_t bytes,
                              const PerplexityOptions& options) override {
    return compute_perplexity(*backend_, tokens, bytes, options);
  }
  std::vector<NamedActivation> hidden_states(std::span<const TokenId> tokens,
                                             const HiddenStatesOptions& options) override {
    return compute_hidden_states(*backend_, tokens, options);
  }
  void steer(std::vector<SteeringVector> vectors, float scale) override {
    backend_->interventions().steer(model_->config(), std::move(vectors), scale);
  }
  void ablate(const Ablation& ablation) override {
    backend_->interventions().ablate(model_->config(), ablation);
  }
  double measure_read_ceiling() override { return backend_->measure_read_ceiling(); }
  DecodeTiming time_decode(std::span<const TokenId> prompt, std::int64_t num_tokens) override {
    return compute_decode_timing(*backend_, prompt, num_tokens);
  }
  std::vector<TimelineEvent> record_timeline(std::span<const TokenId> prompt) override {
    return compute_timeline(*backend_, prompt);
  }

 private:
  std::shared_ptr<Scheduler> make_scheduler(SchedulerOptions scheduling) {
    std::ranges::move(draft_warnings(backend_->info(), scheduling.draft.get()),
                      std::back_inserter(warnings_));
    return std::make_shared<Scheduler>(backend_, std::move(scheduling));
  }

  std::shared_ptr<const Model> model_;
  std::shared_ptr<const Tokenizer> tokenizer_;
  std::string device_reason_;
  std::vector<std::string> warnings_;
  std::string draft_name_;
  // Shared with the generations.
  std::shared_ptr<SharedBackend> backend_;
  std::shared_ptr<Scheduler> scheduler_;
  PromptCache prompt_cache_;
};

}  // namespace

std::unique_ptr<Engine> make_engine(std::shared_ptr<const Model> model,
                                    std::shared_ptr<const Tokenizer> tokenizer,
                                    std::unique_ptr<Backend> backend, std::string device_reason,
                                    StopRequest interrupted, SchedulerOptions scheduling) {
  return std::make_unique<BackendEngine>(std::move(model), std::move(tokenizer), std::move(backend),
                                         std::move(device_reason), std::move(scheduling),
                                         std::move(interrupted));
}

}  // namespace clusterfusion
