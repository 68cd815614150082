#include "engine/open_draft.hpp"

#include <filesystem>

#include "base/fail.hpp"
#include "clusterfusion/hub.hpp"
#include "engine/choose_device.hpp"
#include "engine/model_draft.hpp"
#include "engine/ngram_draft.hpp"
#include "model/intact.hpp"
#include "tokenizer/neighbour_files.hpp"

namespace clusterfusion {
namespace {

constexpr std::int32_t kMostDraftTokens = 15;  // with the token before them, rows of one operand

std::unique_ptr<Draft> open_model_draft(const EngineOptions& options, const std::string& device,
                                        const Model& target, const Tokenizer* target_tokenizer) {
  const std::filesystem::path folder = find_checkpoint(options.draft);
  const std::shared_ptr<const Model> model = Model::open(folder);
  require_same_vocabulary(target, target_tokenizer, *model, open_tokenizer_of(folder).get());
  BackendOptions backend_options;
  backend_options.threads = options.threads;
  backend_options.mode = options.mode;
  // On a GPU the weights' type is the quickest, and a draft decides no text.
  if (device == "cpu") backend_options.kv_dtype = options.kv_dtype;
  DeviceChoice choice{device, {}};
  std::unique_ptr<Backend> backend = make_backend(device, choice, model, backend_options);
  require_intact(*model);
  return make_model_draft(model, std::move(backend), target.config().vocab_size);
}

}  // namespace

void check_draft_options(const EngineOptions& options) {
  require(options.draft_tokens >= 1 && options.draft_tokens <= kMostDraftTokens,
          ErrorKind::invalid_argument,
          "draft_tokens must be in [1, {}] (tokens proposed for a text in one step), got {}",
          kMostDraftTokens, options.draft_tokens);
}

std::unique_ptr<Draft> open_draft(const EngineOptions& options, const std::string& device,
                                  const Model& target, const Tokenizer* target_tokenizer) {
  if (options.draft.empty() || options.draft == "none") return nullptr;
  if (options.draft == "ngram") return std::make_unique<NgramDraft>();
  try {
    return open_model_draft(options, device, target, target_tokenizer);
  } catch (const Error& error) {
    fail(error.kind(), "draft: {}", error.what());
  }
}

}  // namespace clusterfusion
