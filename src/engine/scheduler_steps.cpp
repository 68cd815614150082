// What active sequences compute: pieces of prompts and bursts of decode steps.
#include <algorithm>
#include <iterator>
#include <utility>

#include "base/fail.hpp"
#include "engine/scheduler.hpp"
#include "engine/speculation.hpp"

namespace clusterfusion {

// Whether a piece is to come before the next decode step.
bool Scheduler::prefill(Backend& backend) {
  double spent = 0;
  for (bool is_first = true;; is_first = false) {
    sweep();
    const std::vector<Sequence*> waiting = prefilling();
    if (waiting.empty()) return false;
    const bool beside_streams = disturbs_others(*waiting.front());
    if (!is_first && !beside_streams) return true;
    std::vector<Piece> pieces = next_pieces(waiting, beside_streams);
    std::int64_t tokens = 0;
    for (const Piece& piece : pieces) tokens += piece.count;
    if (!is_first && spent + clock_.piece_seconds(tokens) > clock_.step_seconds()) return false;
    const double start = now();
    prefill_pieces(backend, std::move(pieces));
    spent += now() - start;
  }
}

// Whose prompts are to be read: callers in turns, each one's sequences by arrival.
Scheduler::Members Scheduler::prefilling() const {
  Members members;
  for (const auto& sequence : active_) {
    if (sequence->state == SequenceState::prefilling && !sequence->caller->is_cancelled()) {
      members.push_back(sequence.get());
    }
  }
  std::ranges::stable_sort(members, {},
                           [](const Sequence* sequence) { return sequence->caller->last_piece; });
  return members;
}

bool Scheduler::disturbs_others(const Sequence& sequence) const {
  return std::ranges::any_of(active_, [&](const auto& other) {
    return other->decodes() && other->caller != sequence.caller;
  });
}

// The most tokens of a piece of its prompt.
std::int64_t Scheduler::piece_of(const Sequence& sequence, bool beside_streams) const {
  const std::optional<ScoreDetail>& detail = sequence.request.prompt_detail;
  const std::int64_t most = detail ? scored_piece(info(), *detail) : info().prefill_chunk;
  return beside_streams ? clock_.piece_tokens(info().least_piece, most) : most;
}

// Of the first, and of those behind it as far as they fit into the same pass.
std::vector<Scheduler::Piece> Scheduler::next_pieces(const Members& waiting,
                                                     bool beside_streams) const {
  std::vector<Piece> pieces;
  std::int64_t room = beside_streams ? clock_.piece_tokens(info().least_piece, info().prefill_chunk)
                                     : info().prefill_chunk;
  for (Sequence* const sequence : waiting) {
    const std::int64_t left = std::ssize(sequence->fed) - sequence->length;
    const std::int64_t count = std::min({left, piece_of(*sequence, beside_streams), room});
    if (count == 0) break;
    pieces.push_back({.sequence = sequence, .count = count});
    room -= count;
  }
  return pieces;
}

void Scheduler::prefill_pieces(Backend& backend, std::vector<Piece> pieces) {
  for (const Piece& piece : pieces) piece.sequence->caller->last_piece = round_;
  for (const Piece& piece : pieces) {
    Sequence& sequence = *piece.sequence;
    if (sequence.is_active()) grow(backend, sequence, sequence.length + piece.count);
  }
  std::erase_if(pieces, [](const Piece& piece) { return !piece.sequence->is_active(); });
  if (!pieces.empty()) compute_pieces(backend, pieces);
}

// Of sequences that have the pages.
void Scheduler::compute_pieces(Backend& backend, std::vector<Piece>& pieces) {
  step_members_.clear();
  std::vector<PrefillPart> parts;
  std::int64_t tokens = 0;
  for (Piece& piece : pieces) {
    step_members_.push_back(piece.sequence);
    parts.push_back(prepare(piece));
    tokens += piece.count;
  }
  const double start = now();
  try {
    backend.prefill_together(parts);
  } catch (const Error& error) {
    return compute_apart(backend, pieces, error);
  }
  const double seconds = now() - start;
  clock_.note_piece(seconds, tokens);
  for (Piece& piece : pieces) {
    Sequence& sequence = *piece.sequence;
    if (!sequence.is_active()) continue;  // its caller failed with the one before
    Statistics& statistics = sequence.statistics;
    (statistics.preemptions > 0 ? statistics.recompute_seconds : statistics.prefill_seconds) +=
        seconds;
    take(backend, piece);
  }
}

// After an error of a pass: finds the sequence that it is about, so that the others go on.
void Scheduler::compute_apart(Backend& backend, std::vector<Piece>& pieces, const Error& error) {
  if (pieces.size() > 1 && concerns_one_sequence(error.kind())) {
    for (Piece& piece : pieces) {
      std::vector<Piece> one;
      one.push_back({.sequence = piece.sequence, .count = piece.count});
      if (piece.sequence->is_active()) compute_pieces(backend, one);
    }
    return;
  }
  const std::exception_ptr explained = backend_->explained(error);
  for (const Piece& piece : pieces) {
    if (piece.sequence->is_active()) fail_caller(backend, *piece.sequence->caller, explained);
  }
}

// What the device is to compute of a piece: the token behind the prompt, and the scores of the
// prompt's tokens if they are still missing.
PrefillPart Scheduler::prepare(Piece& piece) const {
  Sequence& sequence = *piece.sequence;
  const auto begin = static_cast<std::size_t>(sequence.length);
  const auto size = static_cast<std::size_t>(piece.count);
  PrefillOutput output;
  if (piece.is_last() && sequence.request.max_new_tokens > 0) {
    output.sampled = &piece.sampled;
    if (!waiting_samples(sequence).empty()) {
      piece.logits.resize(static_cast<std::size_t>(backend_->model().config().vocab_size));
      output.last_logits = piece.logits;
    }
  }
  const std::span<const TokenId> tokens = std::span(sequence.fed).subspan(begin, size);
  if (!sequence.wants_scores()) return {sequence.id, tokens, output};
  const std::span<const TokenId> prompt = sequence.request.prompt;
  const std::span<const TokenId> targets =
      prompt.subspan(begin + 1, std::min(size, prompt.size() - begin - 1));
  piece.scores.resize(targets.size());
  piece.scored.emplace(backend_->model().config().vocab_size, sequence.id, tokens, targets,
                       *sequence.request.prompt_detail, piece.scores, output);
  return piece.scored->part();
}

// A piece that has been computed.
void Scheduler::take(Backend& backend, Piece& piece) {
  Sequence& sequence = *piece.sequence;
  const bool is_last = piece.is_last();
  const auto begin = static_cast<std::size_t>(sequence.length);
  sequence.length += piece.count;
  if (piece.scored) {
    piece.scored->collect();
    post_scores(sequence, begin, piece.scores);
  }
  publish_pages(backend, sequence);
  if (is_last) finish_prefill(backend, sequence, std::move(piece.sampled), piece.logits);
}

// Scores of the prompt's tokens behind `begin`, those that are still missing.
void Scheduler::post_scores(Sequence& sequence, std::size_t begin,
                            std::vector<ScoredToken>& scores) {
  const std::size_t known = sequence.scores.size() > begin ? sequence.scores.size() - begin : 0;
  if (known >= scores.size()) return;
  SequenceNews news = news_of(sequence);
  news.prompt_scores.assign(std::make_move_iterator(scores.begin() + static_cast<long>(known)),
                            std::make_move_iterator(scores.end()));
  sequence.scores.insert(sequence.scores.end(), news.prompt_scores.begin(),
                         news.prompt_scores.end());
  post(sequence, std::move(news));
}

void Scheduler::finish_prefill(Backend& backend, Sequence& sequence, SampledToken sampled,
                               std::span<const float> logits) {
  if (sequence.family) --sequence.family->num_prefilling;
  sequence.state =
      sequence.is_computed_again() ? SequenceState::replaying : SequenceState::decoding;
  if (sequence.request.max_new_tokens == 0) {
    SequenceNews news = news_of(sequence);
    news.finish_reason = FinishReason::token_limit;
    return finish(backend, sequence, std::move(news));
  }
  if (!logits.empty()) share_prompt(backend, sequence, logits);
  if (sequence.is_active()) accept(backend, sequence, std::move(sampled));
}

// Samples of the same prompt that have not begun.
Scheduler::Members Scheduler::waiting_samples(const Sequence& first) const {
  Members samples;
  if (!first.family || !first.tokens.empty()) return samples;
  for (const auto& sequence : waiting_) {
    const bool is_sample = sequence->family == first.family && !sequence->is_active();
    if (is_sample && sequence->state == SequenceState::waiting) samples.push_back(sequence.get());
  }
  return samples;
}

// Gives the prompt's pages to its other samples, as far as there are places and memory; the rest
// finds them in the prefix cache, or computes them again.
void Scheduler::share_prompt(Backend& backend, Sequence& first, std::span<const float> logits) {
  std::vector<KvPageId> pages;
  for (std::int64_t i = 0; i < kv_pages_of(first.length); ++i) {
    pages.push_back(backend.hold_page(first.id, i));
  }
  std::int64_t num_active = std::ssize(active_);
  for (Sequence* const sample : waiting_samples(first)) {
    if (num_active >= options_.max_sequences || !has_room(backend, num_active)) break;
    ++num_active;
    note_admission(*sample, first.length);
    sample->id = backend.create_sequence(sample->request.sampling, sample->request.prompt, pages,
                                         sample->interventions);
    sample->fed = sample->request.prompt;
    sample->length = first.length;
    sample->num_pages = std::ssize(pages);
    sample->shares_last_page = first.shares_last_page = first.length % kKvPagePositions != 0;
    sample->chain = first.chain;
    cache_.pin(sample->chain);
    sample->state = SequenceState::decoding;
    if (!first.scores.empty()) {
      SequenceNews news = news_of(*sample);
      news.prompt_scores = sample->scores = first.scores;
      post(*sample, std::move(news));
    }
    try {
      accept(backend, *sample, backend.sample(sample->id, logits));
    } catch (const Error& error) {
      fail_caller(backend, *first.caller, backend_->explained(error));
      break;
    }
  }
  for (const KvPageId page : pages) backend.drop_page(page);
}

void Scheduler::decode(Backend& backend) {
  sweep();
  Members members;
  for (const auto& sequence : active_) {
    if (sequence->decodes() && !sequence->caller->is_cancelled()) {
      members.push_back(sequence.get());
    }
  }
  if (members.empty() || decode_proposals(backend, members)) return;
  const std::int32_t steps = burst_of(members);
  for (Sequence* member : members) {  // the oldest first
    if (member->is_active()) grow(backend, *member, member->length + steps);
  }
  std::erase_if(members, [](const Sequence* member) { return !member->is_active(); });
  decode_members(backend, members, steps);
}

// No sequence may grow past its limit, not even for a token that is then dropped.
std::int32_t Scheduler::burst_of(const Members& members) const {
  if (!prefilling().empty()) return 1;
  std::int64_t most = info().decode_ahead;
  if (speculation_) most = std::min<std::int64_t>(most, speculation_->longest_burst());
  for (const Sequence* member : members) {
    most = std::min(
        most, member->request.max_new_tokens - static_cast<std::int64_t>(member->num_computed));
  }
  return clock_.burst_steps(static_cast<std::int32_t>(most));
}

void Scheduler::decode_members(Backend& backend, const Members& members, std::int32_t steps) {
  step_members_ = members;
  std::vector<SequenceId> ids;
  std::vector<TokenId> inputs;
  for (const Sequence* member : members) {
    ids.push_back(member->id);
    inputs.push_back(member->tokens[member->num_computed - 1]);
  }
  std::vector<SampledToken> sampled(members.size() * static_cast<std::size_t>(steps));
  const double start = now();
  try {
    backend.decode(ids, inputs, steps, sampled, {});
  } catch (const Error& error) {
    return decode_apart(backend, members, error);
  }
  const double seconds = now() - start;
  clock_.note_burst(seconds, steps);
  if (speculation_) speculation_->note_plain_step(members.size(), seconds / steps);
  double bytes = 0;
  for (std::int32_t step = 0; step < steps; ++step) bytes += step_bytes(members, step);
  note_decode(members, seconds, bytes, steps);
  // A sequence that ends before the last step leaves its surplus tokens behind with its pages.
  for (std::size_t i = 0; i < sampled.size(); ++i) {
    Sequence& member = *members[i % members.size()];
    if (!member.is_active()) continue;
    ++member.length;
    accept(backend, member, std::move(sampled[i]));
  }
  for (Sequence* member : members) {
    if (member->is_active()) publish_pages(backend, *member);
  }
}

// Steps of the members, all of which took `seconds` and read `bytes`.
void Scheduler::note_decode(const Members& members, double seconds, double bytes,
                            std::int32_t steps) {
  for (Sequence* member : members) {
    const bool again = member->is_computed_again();
    (again ? member->statistics.recompute_seconds : member->statistics.decode_seconds) += seconds;
    member->decode_bytes += again ? 0 : bytes;
    member->statistics.decode_steps += again ? 0 : steps;
  }
}

// After an error of a batch: finds the sequence that it is about, so that the others go on.
void Scheduler::decode_apart(Backend& backend, const Members& members, const Error& error) {
  for (const Sequence* member : members) {
    if (backend.length(member->id) > member->length) backend.truncate(member->id, member->length);
  }
  if (members.size() > 1 && concerns_one_sequence(error.kind())) {
    for (Sequence* member : members) {
      if (member->is_active()) decode_members(backend, {member}, 1);
    }
    return;
  }
  const std::exception_ptr explained = backend_->explained(error);
  for (Sequence* member : members) {
    if (member->is_active()) fail_caller(backend, *member->caller, explained);
  }
}

// Bytes that the whole batch reads in the `step`-th step from now: the weights once, and the keys
// and values of each sequence up to the position that the step appends.
double Scheduler::step_bytes(const Members& members, std::int64_t step) const {
  std::int64_t positions = 0;
  for (const Sequence* member : members) positions += member->length + 1 + step;
  return static_cast<double>(backend_->model().bytes_per_token()) +
         static_cast<double>(positions) * static_cast<double>(info().kv_bytes_per_position);
}

// Takes note of a token and decides whether the sequence goes on.
void Scheduler::accept(Backend& backend, Sequence& sequence, SampledToken token) {
  if (sequence.is_computed_again()) {
    const TokenId before = sequence.tokens[sequence.num_computed++];
    if (token.token != before) {
      const auto error = std::make_exception_ptr(Error(
          ErrorKind::internal,
          fmt::format("token {} of a preempted text was {} and is {} now that it is computed again",
                      sequence.num_computed - 1, before, token.token)));
      return fail_caller(backend, *sequence.caller, error);
    }
    if (!sequence.is_computed_again()) sequence.state = SequenceState::decoding;
    return;
  }
  sequence.tokens.push_back(token.token);
  ++sequence.num_computed;
  if (sequence.tokens.size() == 1) {
    sequence.statistics.time_to_first_token_seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - sequence.caller->started)
            .count();
  }
  SequenceNews news = news_of(sequence);
  const PreparedRequest& request = sequence.request;
  if (std::ranges::count(request.stop_tokens, token.token) > 0) {
    news.finish_reason = FinishReason::stop_token;
  } else if (sequence.ends_text && sequence.ends_text(token.token)) {
    news.finish_reason = FinishReason::stop_string;
  } else if (std::ssize(sequence.tokens) >= request.max_new_tokens) {
    news.finish_reason =
        request.ends_at_context ? FinishReason::context_limit : FinishReason::token_limit;
  }
  news.token = std::move(token);
  if (news.finish_reason) return finish(backend, sequence, std::move(news));
  post(sequence, std::move(news));
}

void Scheduler::finish(Backend& backend, Sequence& sequence, SequenceNews news) {
  publish_pages(backend, sequence);
  deactivate(backend, sequence);
  sequence.state = SequenceState::finished;
  post(sequence, std::move(news));
  ++sequence.caller->num_ended;
}

SequenceNews Scheduler::news_of(const Sequence& sequence) const {
  SequenceNews news;
  news.index = sequence.index;
  news.statistics = sequence.statistics;
  news.decode_bytes = sequence.decode_bytes;
  return news;
}

void Scheduler::post(Sequence& sequence, SequenceNews news) {
  Caller& caller = *sequence.caller;
  if (caller.outbox.empty() && caller.num_ended == 0) {
    callers_with_news_.push_back(sequence.caller);
  }
  caller.outbox.push_back(std::move(news));
}

// Ends all sequences of a caller.
void Scheduler::fail_caller(Backend& backend, Caller& caller, const std::exception_ptr& error) {
  std::shared_ptr<Caller> kept;
  for (const Sequences* sequences : {&active_, &waiting_}) {
    for (const auto& sequence : *sequences) {
      if (sequence->caller.get() != &caller) continue;
      kept = sequence->caller;
      if (sequence->is_active()) deactivate(backend, *sequence);
      sequence->state = SequenceState::finished;
    }
  }
  if (!kept) return;
  kept->post(std::exchange(kept->outbox, {}), 0);
  kept->num_ended = 0;
  std::erase(callers_with_news_, kept);
  kept->fail(error);
}

}  // namespace clusterfusion
