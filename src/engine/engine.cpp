#include "clusterfusion/engine.hpp"

#include "base/fail.hpp"
#include "clusterfusion/hub.hpp"
#include "engine/choose_device.hpp"
#include "engine/make_engine.hpp"

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
  return {.threads = options.threads,
          .max_positions = options.max_positions,
          .kv_dtype = options.kv_dtype,
          .load_progress = options.load_progress};
}

}  // namespace

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
  const BackendOptions backend_options = check_options(options, model->config());
  std::shared_ptr<const Tokenizer> tokenizer;
  const std::filesystem::path tokenizer_file = path / "tokenizer.json";
  std::error_code error;
  // A file that is there but cannot be reached is for Tokenizer::open to report.
  if (std::filesystem::symlink_status(tokenizer_file, error).type() !=
      std::filesystem::file_type::not_found) {
    tokenizer = Tokenizer::open(tokenizer_file);
  }
  std::unique_ptr<Backend> backend = make_backend(options.device, choice, model, backend_options);
  return make_engine(model, std::move(tokenizer), std::move(backend), std::move(choice.reason));
}

std::vector<GenerateResult> Engine::generate(std::vector<GenerateRequest> requests,
                                             const EventCallback& on_event) {
  const std::unique_ptr<Generation> generation = start(std::move(requests));
  while (const std::optional<GenerateEvent> event = generation->next()) {
    if (on_event && !on_event(*event)) generation->cancel();
  }
  return generation->results();
}

GenerateResult Engine::generate(GenerateRequest request, const EventCallback& on_event) {
  std::vector<GenerateRequest> requests;
  requests.push_back(std::move(request));
  return std::move(generate(std::move(requests), on_event).front());
}

}  // namespace clusterfusion
