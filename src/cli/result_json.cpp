#include "cli/result_json.hpp"

namespace clusterfusion::cli {
namespace {

Json token_json(TokenId token, const Tokenizer* tokenizer) {
  Json json = {{"token", token}};
  if (tokenizer == nullptr) return json;
  // A model's matrices may have more rows than the tokenizer has tokens.
  const bool known = token < tokenizer->vocab_size();
  json["piece"] = known ? Json(tokenizer->id_to_token(token)) : Json();
  return json;
}

Json logprob_json(TokenId token, float logprob, const std::vector<TokenLogprob>& top,
                  const Tokenizer* tokenizer) {
  Json json = token_json(token, tokenizer);
  json["logprob"] = logprob;
  json["top"] = Json::array();
  for (const TokenLogprob& likely : top) {
    Json entry = token_json(likely.token, tokenizer);
    entry["logprob"] = likely.logprob;
    json["top"].push_back(std::move(entry));
  }
  return json;
}

}  // namespace

Json to_json(const Statistics& statistics) {
  return {
      {"prompt_tokens", statistics.prompt_tokens},
      {"new_tokens", statistics.new_tokens},
      {"prefill_seconds", statistics.prefill_seconds},
      {"time_to_first_token_seconds", statistics.time_to_first_token_seconds},
      {"decode_seconds", statistics.decode_seconds},
      {"seconds_per_token", statistics.seconds_per_token},
      {"tokens_per_second", statistics.tokens_per_second},
      {"bytes_per_second", statistics.bytes_per_second},
      {"read_ceiling_bytes_per_second", statistics.read_ceiling_bytes_per_second},
      {"ceiling_share", statistics.ceiling_share},
      {"queue_seconds", statistics.queue_seconds},
      {"preemptions", statistics.preemptions},
      {"recompute_seconds", statistics.recompute_seconds},
      {"prefix_hit_tokens", statistics.prefix_hit_tokens},
      {"decode_steps", statistics.decode_steps},
      {"draft_steps", statistics.draft_steps},
      {"draft_proposed", statistics.draft_proposed},
      {"draft_accepted", statistics.draft_accepted},
      {"mean_accepted", statistics.mean_accepted},
  };
}

Json to_json(const SampledToken& sampled, const Tokenizer* tokenizer, bool with_logprob) {
  if (!with_logprob) return token_json(sampled.token, tokenizer);
  return logprob_json(sampled.token, sampled.logprob, sampled.top, tokenizer);
}

Json to_json(const GenerateResult& result, const Tokenizer* tokenizer) {
  Json json = {
      {"text", result.text},     {"prompt_tokens", result.prompt_tokens},
      {"tokens", result.tokens}, {"finish_reason", nullptr},
      {"logprobs", nullptr},     {"statistics", to_json(result.statistics)},
  };
  if (result.finish_reason) {
    json["finish_reason"] = clusterfusion::name_of(*result.finish_reason);
  }
  if (!result.sampled.empty()) {
    json["logprobs"] = Json::array();
    for (const SampledToken& sampled : result.sampled) {
      json["logprobs"].push_back(to_json(sampled, tokenizer, true));
    }
  }
  return json;
}

Json to_json(const LoglikelihoodResult& result, const Tokenizer& tokenizer) {
  Json json = {
      {"total_logprob", result.total}, {"is_greedy", result.is_greedy}, {"tokens", Json::array()}};
  for (const ScoredToken& token : result.tokens) {
    json["tokens"].push_back(logprob_json(token.token, token.logprob, token.top, &tokenizer));
  }
  return json;
}

std::string to_line(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace clusterfusion::cli
