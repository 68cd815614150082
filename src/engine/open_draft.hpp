// The draft that EngineOptions ask for.
#pragma once

#include <memory>
#include <string>

#include "clusterfusion/engine.hpp"
#include "engine/draft.hpp"

namespace clusterfusion {

// Errors: invalid_argument (draft_tokens).
void check_draft_options(const EngineOptions& options);

// Null if none is asked for. `device` is the target's, "cpu" or "cuda"; a null tokenizer: it has
// none.
// Errors: those of Model::open, Tokenizer::open and the backends, which say that it is the draft's;
// invalid_argument for one with other tokens.
std::unique_ptr<Draft> open_draft(const EngineOptions& options, const std::string& device,
                                  const Model& target, const Tokenizer* target_tokenizer);

}  // namespace clusterfusion
