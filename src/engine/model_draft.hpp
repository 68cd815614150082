// A smaller checkpoint as the draft: it decodes ahead with its own keys and values, and with the
// noise of the text that it guesses, which makes it agree more often.
#pragma once

#include <memory>

#include "backend/backend.hpp"
#include "clusterfusion/tokenizer.hpp"
#include "engine/draft.hpp"

namespace clusterfusion {

// `backend` computes `model`, and is used by nobody else; it stays as long as texts need it.
// `target_vocab_size`: ids from there on are not proposed.
std::unique_ptr<Draft> make_model_draft(std::shared_ptr<const Model> model,
                                        std::unique_ptr<Backend> backend,
                                        std::int64_t target_vocab_size);

// Whether ids mean the same to both, as far as both have them; vocabularies may be padded to
// different widths. A null tokenizer: the checkpoint has none.
// Errors: invalid_argument, which tells the first difference.
void require_same_vocabulary(const Model& target, const Tokenizer* target_tokenizer,
                             const Model& draft, const Tokenizer* draft_tokenizer);

}  // namespace clusterfusion
