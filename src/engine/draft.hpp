// Who guesses what comes next in a text, so that the model computes several tokens in one step.
//
// A guess changes nothing but the time that a text takes: the model keeps what it would have chosen
// itself (Backend::verify()). So a draft may say anything, and nothing where it has nothing to say.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "clusterfusion/model.hpp"
#include "clusterfusion/sampling.hpp"

namespace clusterfusion {

// How sure drafts may say they are, from 0 on: acceptance is counted apart for each.
inline constexpr std::int32_t kCertainties = 4;

// What a draft knows of one text.
class DraftText {
 public:
  virtual ~DraftText() = default;
  // The tokens that come next: first those of the prompt. Only takes note of them.
  virtual void append(std::span<const TokenId> tokens) = 0;
  // Reads what was appended, or of much a part, so that other texts need not wait for long. Whether
  // it has read all, and can propose.
  virtual bool read() = 0;
  // About how long reading all will take.
  virtual double seconds_to_read() const { return 0; }
};

// What is wanted for one text.
struct DraftQuery {
  DraftText* text = nullptr;         // of this draft, which has read all
  std::int32_t most = 0;             // so many tokens at most, 1 or more; the draft may lower it
  std::vector<TokenId> tokens = {};  // that follow the text; ids of no vocabulary end them
  std::int32_t certainty = 0;        // of them, below kCertainties
};

// Not thread-safe. Nothing that a text or a broken draft causes is thrown: it proposes nothing
// then.
class Draft {
 public:
  virtual ~Draft() = default;
  virtual std::string name() const = 0;
  // A text that is sampled so, before its first token. It may outlive the draft.
  virtual std::unique_ptr<DraftText> begin(const SamplingParams& sampling) = 0;
  // Puts proposals into the queries.
  virtual void propose(std::span<DraftQuery> queries) = 0;
  // Whether proposals take next to no time, so that some may be made in vain.
  virtual bool is_cheap() const = 0;
  // Seconds that one more token proposed for all texts takes, of a draft that is not cheap.
  virtual double seconds_per_token() const { return 0; }
};

}  // namespace clusterfusion
