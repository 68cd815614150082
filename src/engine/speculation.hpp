// How many tokens to let a draft propose for each text of a step, from what was measured: how often
// it was right, and what steps cost. What comes of it is the same text; see draft.hpp.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "engine/draft.hpp"
#include "engine/drafted_text.hpp"
#include "engine/step_costs.hpp"

namespace clusterfusion {

// A text of the coming step.
struct DraftCandidate {
  DraftedText* text = nullptr;  // null: nothing is to be proposed
  std::int32_t most = 0;        // tokens that there is room for
  std::int64_t new_tokens = 0, max_new_tokens = 0;
  // Out:
  std::vector<TokenId> proposals = {};
  std::int32_t certainty = 0;
};

struct SpeculationOptions {
  std::int32_t most_tokens = 8;  // proposed for one text
  bool adapts = true;            // else always as many as the draft gives
  std::int64_t vocab_size = 0;   // ids beyond are no proposals
  std::int32_t verify_rows = 1;  // BackendInfo's
  std::function<double()> now;   // seconds
};

class Speculation {
 public:
  // Of the time that a text of kWindow tokens takes without a draft, what one may cost it at most
  // if it is always wrong.
  static constexpr double kMostLost = 0.03;
  static constexpr std::int64_t kWindow = 256;

  Speculation(std::unique_ptr<Draft> draft, SpeculationOptions options);

  // Times steps of the device and the draft, before there are texts. Without, or where it fails,
  // it proposes only if it does not adapt.
  void measure(Backend& backend);

  DraftedText begin(const SamplingParams& sampling) { return {.draft = draft_->begin(sampling)}; }

  // Puts proposals into candidates, which are all of a coming step. False where there are none.
  bool propose(std::span<DraftCandidate> candidates);
  // Of what was proposed accepted[i] tokens were right; the step without the draft took `seconds`.
  void note_step(std::span<const DraftCandidate> candidates, std::span<const std::int32_t> accepted,
                 double seconds);
  // A step without proposals.
  void note_plain_step(std::size_t texts, double seconds);
  // Steps that may be made before it is asked again: more where it has had nothing to propose.
  std::int32_t longest_burst() const noexcept { return idle_steps_; }

 private:
  double seconds_of(Backend& backend, SequenceId id, std::int32_t rows, int repetitions) const;
  // Numbers of tokens to propose: of each candidate at most `available`, which become these.
  void plan(std::span<const DraftCandidate> candidates, std::span<std::int32_t> available) const;
  double budget(std::span<const DraftCandidate> candidates, double plain) const;
  double share_of(const DraftedText& text, std::int32_t certainty) const;
  double reading_share(const DraftCandidate& candidate) const;
  void ask(std::span<DraftCandidate> candidates, std::span<const std::int32_t> most);
  bool read(DraftedText& text);
  static void settle(const DraftCandidate& candidate, double plain);
  void note_idle(std::span<const DraftCandidate> candidates);

  std::unique_ptr<Draft> draft_;
  SpeculationOptions options_;
  StepCosts costs_;
  std::array<Acceptance, kCertainties> acceptance_;  // of all texts
  double draft_seconds_ = 0;                         // of the coming step, without
  double reading_seconds_ = 0;                       // what the draft has read for it
  std::int32_t idle_steps_ = 1;
};

}  // namespace clusterfusion
