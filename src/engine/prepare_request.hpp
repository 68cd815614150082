// A request, checked and in tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "clusterfusion/engine.hpp"
#include "engine/scored_prefill.hpp"

namespace clusterfusion {

// What a request is checked against.
struct RequestLimits {
  const Model& model;
  const Tokenizer* tokenizer;  // null: none
  std::int64_t max_positions;  // of the engine
  std::int64_t kv_pages;       // that one sequence may have
};

struct PreparedRequest {
  std::vector<TokenId> prompt;      // at least one
  std::int64_t max_new_tokens = 0;  // that fit the context too
  bool ends_at_context = false;     // max_new_tokens is the context's limit, not the request's
  SamplingParams sampling;
  std::vector<std::string> stop_strings;
  std::vector<TokenId> stop_tokens;  // the model's end-of-text tokens among them
  bool skip_special_tokens = true;
  std::optional<ScoreDetail> prompt_detail;  // if the prompt's tokens are to be scored
};

// GenerateRequest::n is left to the caller.
// Errors: invalid_argument, out_of_range, out_of_memory.
PreparedRequest prepare_request(GenerateRequest request, const RequestLimits& limits);

// Errors: out_of_range naming `what`, index, id and vocabulary.
void check_tokens(std::span<const TokenId> tokens, std::int64_t vocab_size, const char* what);

}  // namespace clusterfusion
