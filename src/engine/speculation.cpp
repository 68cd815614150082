#include "engine/speculation.hpp"

#include <algorithm>
#include <limits>
#include <utility>

namespace clusterfusion {
namespace {

constexpr double kExpected = 0.6;       // share that is right, before anything is seen
constexpr double kExpectedWeight = 20;  // of the engine's texts
constexpr double kEngineWeight = 2;     // what those say of a new one
constexpr double kKeptOfText = 0.9;     // at each step
constexpr double kKeptOfEngine = 0.998;
constexpr double kKeptIdle = 0.98;    // without proposals, so that they are tried again
constexpr double kReadingSteps = 64;  // by which what a draft must read should pay
constexpr std::int32_t kLongestBurst = 16;
constexpr std::int32_t kRowsMeasured = 16;
constexpr int kRepetitions = 3;
constexpr double kMeasuredSeconds = 1;  // what takes longer is measured once
// Of the time that kWindow tokens take without a draft, what may be lost at once, what besides once
// it has been gained, and what little by little.
constexpr double kLostAtOnce = 0.008;
constexpr double kGainKept = 0.008;
constexpr double kLostByAndBy = 0.014;
static_assert(kLostAtOnce + kGainKept + kLostByAndBy <= Speculation::kMostLost + 1e-9);

}  // namespace

Speculation::Speculation(std::unique_ptr<Draft> draft, SpeculationOptions options)
    : draft_(std::move(draft)), options_(std::move(options)) {
  options_.most_tokens = std::min(options_.most_tokens, options_.verify_rows - 1);
  acceptance_.fill({kExpected * kExpectedWeight, kExpectedWeight});
}

void Speculation::measure(Backend& backend) {
  const std::int64_t room = backend.info().max_positions - 1;
  const auto most = static_cast<std::int32_t>(
      std::min<std::int64_t>({kRowsMeasured, options_.verify_rows, room}));
  const SequenceId id = backend.create_sequence({});
  try {
    backend.reserve(id, 1 + most);
    const TokenId first = 0;
    backend.prefill(id, {&first, 1}, {});
    const double begin = options_.now();
    for (std::int32_t rows = 1; rows <= most; rows *= 2) {
      const bool is_slow = options_.now() - begin > kMeasuredSeconds;
      costs_.note(rows, seconds_of(backend, id, rows, is_slow ? 1 : kRepetitions));
    }
  } catch (const Error&) {
    costs_ = {};
  }
  backend.release_sequence(id);
  if (draft_->is_cheap()) return;
  const DraftedText text = begin({});
  text.draft->append(std::vector<TokenId>(kRowsMeasured, 0));
  for (int i = 0; i < kRepetitions && text.draft->read(); ++i) {
    DraftQuery query{text.draft.get(), 2};
    draft_->propose({&query, 1});
  }
}

// Of a step behind one token, the quickest of some.
double Speculation::seconds_of(Backend& backend, SequenceId id, std::int32_t rows,
                               int repetitions) const {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < repetitions; ++i) {
    Proposal proposal{id, std::vector<TokenId>(static_cast<std::size_t>(rows), 0)};
    const double start = options_.now();
    backend.verify({&proposal, 1});
    best = std::min(best, options_.now() - start);
    backend.truncate(id, 1);
  }
  return best;
}

double Speculation::share_of(const DraftedText& text, std::int32_t certainty) const {
  const auto at = static_cast<std::size_t>(certainty);
  return text.acceptance[at].share(acceptance_[at].share(kExpected, 0), kEngineWeight);
}

// Seconds that the step may take longer than a plain one if no proposal is right.
double Speculation::budget(std::span<const DraftCandidate> candidates, double plain) const {
  double least = std::numeric_limits<double>::infinity();
  for (const DraftCandidate& candidate : candidates) {
    if (candidate.text == nullptr) continue;
    const auto tokens = static_cast<double>(std::min(candidate.max_new_tokens, kWindow));
    least = std::min(least, plain * kLostAtOnce * tokens - candidate.text->lost);
  }
  return least;
}

// The tokens that are most likely right come first; of them so many as give the most tokens a
// second.
void Speculation::plan(std::span<const DraftCandidate> candidates,
                       std::span<std::int32_t> available) const {
  struct Token {
    double share;  // that it, and all before it, is right
    std::size_t candidate;
  };
  std::vector<Token> tokens;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    double share = 1;
    for (std::int32_t n = std::exchange(available[i], 0); n > 0; --n) {
      tokens.push_back({share *= share_of(*candidates[i].text, candidates[i].certainty), i});
    }
  }
  std::ranges::stable_sort(tokens, std::ranges::greater{}, &Token::share);
  const auto texts = static_cast<std::int32_t>(candidates.size());
  const double plain = costs_.seconds(texts);
  const double most_lost = budget(candidates, plain);
  std::vector<std::int32_t> counts(candidates.size(), 0);
  double best_rate = texts / plain, right = 0, reading = 0;
  std::int32_t best = 0, longest = 0;
  const auto most =
      std::min(static_cast<std::int32_t>(tokens.size()), options_.verify_rows - texts);
  for (std::int32_t n = 1; n <= most && plain > 0; ++n) {
    const Token& token = tokens[static_cast<std::size_t>(n - 1)];
    if (counts[token.candidate]++ == 0) reading += reading_share(candidates[token.candidate]);
    longest = std::max(longest, counts[token.candidate]);
    right += token.share;
    const double seconds = costs_.seconds(texts + n) + longest * draft_->seconds_per_token();
    const double rate = (texts + right) / (seconds + reading);
    if (seconds - plain > most_lost || rate <= best_rate) continue;
    best = n;
    best_rate = rate;
  }
  for (std::int32_t n = 0; n < best; ++n) {
    ++available[tokens[static_cast<std::size_t>(n)].candidate];
  }
}

// What this step is to bear of what the draft must read before it can propose.
double Speculation::reading_share(const DraftCandidate& candidate) const {
  const auto left = static_cast<double>(candidate.max_new_tokens - candidate.new_tokens);
  return candidate.text->draft->seconds_to_read() / std::clamp(left, 1.0, kReadingSteps);
}

bool Speculation::read(DraftedText& text) {
  const double start = options_.now();
  const bool has_all = text.draft->read();
  const double seconds = options_.now() - start;
  reading_seconds_ += seconds;
  if (text.has_read) text.lost += seconds;
  text.has_read |= has_all;
  return has_all;
}

// Asks for most[i] tokens, but for texts that the draft has not read.
void Speculation::ask(std::span<DraftCandidate> candidates, std::span<const std::int32_t> most) {
  std::vector<DraftQuery> queries;
  std::vector<DraftCandidate*> asked;
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    if (most[i] == 0 || !read(*candidates[i].text)) continue;
    queries.push_back({candidates[i].text->draft.get(), most[i]});
    asked.push_back(&candidates[i]);
  }
  draft_->propose(queries);
  for (std::size_t i = 0; i < queries.size(); ++i) {
    std::vector<TokenId>& tokens = queries[i].tokens;
    tokens.resize(std::min(tokens.size(), static_cast<std::size_t>(queries[i].most)));
    const auto foreign = std::ranges::find_if(
        tokens, [this](TokenId token) { return token < 0 || token >= options_.vocab_size; });
    tokens.erase(foreign, tokens.end());
    asked[i]->proposals = std::move(tokens);
    asked[i]->certainty = std::clamp(queries[i].certainty, 0, kCertainties - 1);
  }
}

bool Speculation::propose(std::span<DraftCandidate> candidates) {
  const double start = options_.now();
  reading_seconds_ = 0;
  std::vector<std::int32_t> most;
  for (const DraftCandidate& candidate : candidates) {
    const bool may = candidate.text != nullptr;
    most.push_back(may ? std::clamp(candidate.most, 0, options_.most_tokens) : 0);
    if (may) settle(candidate, costs_.seconds(static_cast<std::int32_t>(candidates.size())));
  }
  if (!draft_->is_cheap() && options_.adapts) plan(candidates, most);
  ask(candidates, most);
  if (draft_->is_cheap() && options_.adapts) {
    for (std::size_t i = 0; i < most.size(); ++i) {
      most[i] = static_cast<std::int32_t>(candidates[i].proposals.size());
    }
    plan(candidates, most);
    for (std::size_t i = 0; i < most.size(); ++i) {
      candidates[i].proposals.resize(static_cast<std::size_t>(most[i]));
    }
  }
  draft_seconds_ = options_.now() - start - reading_seconds_;
  const bool proposes = std::ranges::any_of(
      candidates, [](const DraftCandidate& candidate) { return !candidate.proposals.empty(); });
  idle_steps_ = proposes ? 1 : std::min(2 * idle_steps_, kLongestBurst);
  if (!proposes) note_idle(candidates);
  return proposes;
}

// Tokens that have come allow for a loss again.
void Speculation::settle(const DraftCandidate& candidate, double plain) {
  DraftedText& text = *candidate.text;
  const std::int64_t come =
      candidate.new_tokens - std::exchange(text.num_settled, candidate.new_tokens);
  const double allowed = kLostByAndBy * plain * static_cast<double>(come);
  if (text.lost > 0) text.lost = std::max(text.lost - allowed, 0.0);
}

// What is known fades, so that proposals are tried again.
void Speculation::note_idle(std::span<const DraftCandidate> candidates) {
  for (const DraftCandidate& candidate : candidates) {
    if (candidate.text == nullptr) continue;
    candidate.text->lost += draft_seconds_;
    for (Acceptance& of_text : candidate.text->acceptance) of_text.note(0, 0, kKeptIdle);
  }
  constexpr double kForgotten = (1 - kKeptOfEngine) * kExpectedWeight;
  for (Acceptance& of_engine : acceptance_) {
    of_engine.note(kForgotten * kExpected, kForgotten, kKeptOfEngine);
  }
}

void Speculation::note_step(std::span<const DraftCandidate> candidates,
                            std::span<const std::int32_t> accepted, double seconds) {
  std::int32_t rows = 0;
  for (const DraftCandidate& candidate : candidates) {
    rows += 1 + static_cast<std::int32_t>(candidate.proposals.size());
  }
  costs_.note(rows, seconds);
  const double plain = costs_.seconds(static_cast<std::int32_t>(candidates.size()));
  for (std::size_t i = 0; i < candidates.size(); ++i) {
    if (candidates[i].text == nullptr) continue;
    DraftedText& text = *candidates[i].text;
    text.lost += seconds + draft_seconds_ - (1 + accepted[i]) * plain;
    text.lost = std::max(text.lost, -kGainKept * static_cast<double>(kWindow) * plain);
    const auto proposed = static_cast<std::int32_t>(candidates[i].proposals.size());
    if (proposed == 0) continue;
    const auto seen = static_cast<double>(std::min(accepted[i] + 1, proposed));
    const auto at = static_cast<std::size_t>(candidates[i].certainty);
    text.acceptance[at].note(accepted[i], seen, kKeptOfText);
    acceptance_[at].note(accepted[i], seen, kKeptOfEngine);
  }
}

void Speculation::note_plain_step(std::size_t texts, double seconds) {
  costs_.note(static_cast<std::int32_t>(texts), seconds);
}

}  // namespace clusterfusion
