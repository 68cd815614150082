#include "engine/prepare_request.hpp"

#include <algorithm>

#include "base/fail.hpp"
#include "tokenizer/neighbour_files.hpp"
#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

constexpr std::int32_t kMostSamples = 1 << 16;

std::string suggest_first_token(const ModelConfig& config) {
  if (config.bos_token)
    return fmt::format(", for example token {} (bos_token_id)", *config.bos_token);
  if (!config.eos_tokens.empty()) {
    return fmt::format(", for example token {} (eos_token_id)", config.eos_tokens.front());
  }
  return "";
}

std::vector<TokenId> prompt_of(GenerateRequest& request, const RequestLimits& limits) {
  if (!request.prompt_tokens.empty()) {
    check_tokens(request.prompt_tokens, limits.model.config().vocab_size, "prompt_tokens");
    return std::move(request.prompt_tokens);
  }
  std::vector<TokenId> prompt;
  if (!request.prompt.empty() && limits.tokenizer == nullptr)
    fail_no_tokenizer(limits.model.folder());
  if (limits.tokenizer != nullptr) {
    prompt = limits.tokenizer->encode(request.prompt, request.add_special_tokens);
    check_tokens(prompt, limits.model.config().vocab_size, "the prompt's token");
  }
  require(
      !prompt.empty(), ErrorKind::invalid_argument,
      "the prompt has no tokens, and the model needs at least one to start from; pass some text, "
      "or token ids as prompt_tokens{}",
      suggest_first_token(limits.model.config()));
  return prompt;
}

void check_stops(const GenerateRequest& request, const RequestLimits& limits) {
  for (std::size_t i = 0; i < request.stop_strings.size(); ++i) {
    require(!request.stop_strings[i].empty(), ErrorKind::invalid_argument,
            "stop_strings[{}] is empty; every text begins with it: leave it out", i);
    require(is_valid_utf8(request.stop_strings[i]), ErrorKind::invalid_argument,
            "stop_strings[{}] is not UTF-8, and so cannot stand in a text", i);
  }
  if (!request.stop_strings.empty() && limits.tokenizer == nullptr)
    fail_no_tokenizer(limits.model.folder());
  check_tokens(request.stop_tokens, limits.model.config().vocab_size, "stop_tokens");
}

void check_prompt_fits(const PreparedRequest& prepared, std::int64_t max_new_tokens,
                       const RequestLimits& limits) {
  const std::int64_t length = std::ssize(prepared.prompt);
  const std::int64_t longest = max_new_tokens > 0 ? limits.max_positions - 1 : limits.max_positions;
  const std::int64_t of_model = limits.model.config().max_positions;
  const std::string or_longer =
      limits.max_positions < of_model
          ? fmt::format(", or raise max_positions (the model allows {})", of_model)
          : "";
  require(
      length <= longest, ErrorKind::invalid_argument,
      "the prompt has {} tokens, and the context of {} positions has room for {}{}; shorten the "
      "prompt by {} or more tokens{}",
      length, limits.max_positions, longest, max_new_tokens > 0 ? " and a new token" : "",
      length - longest, or_longer);
}

void check_memory(const PreparedRequest& prepared, const RequestLimits& limits) {
  // The last token is never fed.
  const std::int64_t positions =
      std::ssize(prepared.prompt) + std::max<std::int64_t>(prepared.max_new_tokens - 1, 0);
  require(kv_pages_of(positions) <= limits.kv_pages, ErrorKind::out_of_memory,
          "the request may need {} pages of {} positions for its {} prompt tokens and up to {} new "
          "ones, and the KV cache has {}: shorten the prompt, lower max_new_tokens, raise kv_bytes "
          "or choose a smaller kv_dtype",
          kv_pages_of(positions), kKvPagePositions, prepared.prompt.size(), prepared.max_new_tokens,
          limits.kv_pages);
}

// What the request forbids, in the backend's terms.
void restrict_sampling(const GenerateRequest& request, const RequestLimits& limits,
                       PreparedRequest& prepared) {
  SamplingParams& sampling = prepared.sampling;
  sampling.num_prompt_tokens = std::ssize(prepared.prompt);
  sampling.suppressed_tokens.clear();
  sampling.suppressed_until = 0;
  if (request.min_new_tokens > 0) {
    sampling.suppressed_tokens = prepared.stop_tokens;
    sampling.suppressed_until = sampling.num_prompt_tokens + request.min_new_tokens;
  }
  const std::int64_t vocab_size = limits.model.config().vocab_size;
  const bool is_padded = limits.tokenizer != nullptr && limits.tokenizer->vocab_size() < vocab_size;
  sampling.drawable_vocab_size =
      is_padded && !request.allow_padded_ids ? limits.tokenizer->vocab_size() : 0;
}

}  // namespace

void check_tokens(std::span<const TokenId> tokens, std::int64_t vocab_size, const char* what) {
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    require(tokens[i] >= 0 && tokens[i] < vocab_size, ErrorKind::out_of_range,
            "{}[{}] is {}, expected a token id in [0, {}) (the model's vocab_size)", what, i,
            tokens[i], vocab_size);
  }
}

PreparedRequest prepare_request(GenerateRequest request, const RequestLimits& limits) {
  request.sampling.validate();
  require(request.max_new_tokens >= 0, ErrorKind::invalid_argument,
          "max_new_tokens must be >= 0, got {}", request.max_new_tokens);
  require(request.n >= 1 && request.n <= kMostSamples, ErrorKind::invalid_argument,
          "n must be in [1, {}] (samples of the prompt), got {}", kMostSamples, request.n);
  require(request.num_prompt_logprobs >= -1 && request.num_prompt_logprobs <= 100,
          ErrorKind::invalid_argument,
          "num_prompt_logprobs must be in [-1, 100] (-1: none), got {}",
          request.num_prompt_logprobs);
  require(request.min_new_tokens >= 0 && request.min_new_tokens <= request.max_new_tokens,
          ErrorKind::invalid_argument, "min_new_tokens must be in [0, {}] (max_new_tokens), got {}",
          request.max_new_tokens, request.min_new_tokens);
  std::vector<TokenId> biased;
  for (const TokenBias& bias : request.sampling.logit_bias) biased.push_back(bias.token);
  check_tokens(biased, limits.model.config().vocab_size, "logit_bias");
  check_stops(request, limits);

  PreparedRequest prepared;
  prepared.prompt = prompt_of(request, limits);
  check_prompt_fits(prepared, request.max_new_tokens, limits);
  const std::int64_t room = limits.max_positions - std::ssize(prepared.prompt);
  prepared.max_new_tokens = std::min(request.max_new_tokens, room);
  prepared.ends_at_context = request.max_new_tokens > room;
  check_memory(prepared, limits);
  prepared.sampling = request.sampling;
  prepared.stop_strings = std::move(request.stop_strings);
  prepared.stop_tokens = std::move(request.stop_tokens);
  if (!request.ignore_eos) {
    prepared.stop_tokens.insert(prepared.stop_tokens.end(),
                                limits.model.config().eos_tokens.begin(),
                                limits.model.config().eos_tokens.end());
  }
  prepared.skip_special_tokens = request.skip_special_tokens;
  if (request.num_prompt_logprobs >= 0) {
    prepared.prompt_detail = {.num_top = request.num_prompt_logprobs};
  }
  restrict_sampling(request, limits, prepared);
  return prepared;
}

}  // namespace clusterfusion
