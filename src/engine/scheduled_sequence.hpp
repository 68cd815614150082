// A sequence as the scheduler sees it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "backend/backend.hpp"
#include "engine/caller.hpp"
#include "engine/drafted_text.hpp"
#include "engine/prefix_cache.hpp"
#include "engine/prepare_request.hpp"

namespace clusterfusion {

enum class SequenceState {
  waiting,     // for pages, or for a place among max_sequences
  prefilling,  // pieces of its prompt are being computed
  decoding,
  replaying,  // decodes again what it had decoded before it was preempted
  preempted,  // gave its pages to older sequences; waits before those that never ran
  finished
};
const char* name_of(SequenceState state) noexcept;  // "waiting", ...

// Samples of one prompt: while one of them computes it the others wait, and then share its pages.
struct PromptFamily {
  int num_prefilling = 0;
};

struct ScheduledSequence {
  std::shared_ptr<Caller> caller;
  std::size_t index = 0;  // the caller's number of it
  PreparedRequest request;
  std::shared_ptr<const Interventions> interventions;  // that held when it began; null: none
  std::shared_ptr<PromptFamily> family;                // null for a prompt of its own
  std::function<bool(TokenId)> ends_text;  // told each new token: whether a stop string is
                                           // complete; empty without stop strings
  std::uint64_t arrival = 0;
  SequenceState state = SequenceState::waiting;

  // What outlives a preemption.
  std::vector<TokenId> tokens;      // new ones
  std::vector<ScoredToken> scores;  // of the prompt
  Statistics statistics;
  double decode_bytes = 0;
  double waiting_since = 0;

  // While it is active: holds a sequence of the backend.
  SequenceId id = -1;
  std::vector<TokenId> fed;            // what is prefilled: the prompt, and after a preemption also
                                       // tokens where that gives the bits that decoding gave
  std::int64_t length = 0;             // positions that hold keys and values
  std::int64_t num_pages = 0;          // reserved
  bool shares_last_page = false;       // which is to be copied before a position is added
  std::size_t num_computed = 0;        // of `tokens`, since it became active or by `fed`
  PrefixCache::Chain chain;            // its full pages in the prefix cache
  std::optional<DraftedText> drafted;  // what the draft knows of it, once it was asked

  bool is_active() const noexcept { return id >= 0; }
  bool decodes() const noexcept {
    return state == SequenceState::decoding || state == SequenceState::replaying;
  }
  bool is_computed_again() const noexcept { return num_computed < tokens.size(); }
  // Whether scores of its prompt are still to come.
  bool wants_scores() const noexcept {
    return request.prompt_detail && scores.size() + 1 < request.prompt.size();
  }
  TokenId token_at(std::int64_t position) const {
    const auto at = static_cast<std::size_t>(position);
    return at < request.prompt.size() ? request.prompt[at] : tokens[at - request.prompt.size()];
  }
};

}  // namespace clusterfusion
