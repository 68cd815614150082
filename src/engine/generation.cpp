#include "engine/generation.hpp"

#include <algorithm>
#include <iterator>

namespace clusterfusion {
namespace {

double seconds_since(BatchGeneration::Clock::time_point start) {
  return std::chrono::duration<double>(BatchGeneration::Clock::now() - start).count();
}

GenerateEvent last_event(std::size_t index, FinishReason reason) {
  GenerateEvent event;
  event.index = index;
  event.finish_reason = reason;
  return event;
}

}  // namespace

BatchGeneration::BatchGeneration(std::shared_ptr<SharedBackend> backend,
                                 std::shared_ptr<const Tokenizer> tokenizer,
                                 std::vector<PreparedRequest> requests, Clock::time_point started)
    : backend_(std::move(backend)), started_(started), results_(requests.size()) {
  const std::shared_ptr<const Interventions> interventions = backend_->interventions().now();
  sequences_.reserve(requests.size());
  for (std::size_t index = 0; index < requests.size(); ++index) {
    PreparedRequest& request = requests[index];
    results_[index].prompt_tokens = request.prompt;
    results_[index].statistics.prompt_tokens = std::ssize(request.prompt);
    if (request.max_new_tokens == 0 && !request.prompt_detail) {
      results_[index].finish_reason = FinishReason::token_limit;
      events_.push_back(last_event(index, FinishReason::token_limit));
      continue;
    }
    auto handle = std::make_unique<SequenceHandle>(
        *backend_, request.sampling, std::ssize(request.prompt) + request.max_new_tokens,
        interventions);
    TextStream text(tokenizer, request.skip_special_tokens, std::move(request.stop_strings));
    sequences_.push_back({index, std::move(request), std::move(text), std::move(handle)});
  }
}

std::optional<GenerateEvent> BatchGeneration::next() {
  try {
    while (events_.empty() && advance()) {
    }
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::interrupted) cancel_sequences();
    sequences_.clear();
    events_.clear();
    throw;
  } catch (...) {
    sequences_.clear();
    events_.clear();
    throw;
  }
  if (events_.empty()) return std::nullopt;
  GenerateEvent event = std::move(events_.front());
  events_.pop_front();
  return event;
}

bool BatchGeneration::advance() {
  if (sequences_.empty()) return false;
  try {
    if (is_cancelled()) throw Stopped{};
    advance_sequences();
  } catch (const Stopped&) {
    cancel_sequences();
  }
  drop_finished();
  return true;
}

void BatchGeneration::advance_sequences() {
  const auto waiting = std::ranges::find_if(sequences_, &Sequence::in_prefill);
  if (waiting != sequences_.end()) {
    prefill_piece(*waiting);
  } else {
    decode_batch();
  }
}

void BatchGeneration::cancel_sequences() {
  for (Sequence& sequence : sequences_) {
    if (sequence.handle) emit(sequence, last_event(sequence.index, FinishReason::cancelled));
  }
}

void BatchGeneration::prefill_piece(Sequence& sequence) {
  const std::int64_t left = std::ssize(sequence.request.prompt) - sequence.prefilled;
  const std::optional<ScoreDetail>& detail = sequence.request.prompt_detail;
  const std::int64_t most =
      detail ? scored_piece(backend_->info(), *detail) : backend_->info().prefill_chunk;
  const std::int64_t count = std::min(left, most);
  const std::span<const TokenId> piece =
      std::span(sequence.request.prompt).subspan(sequence.prefilled, count);
  SampledToken sampled;
  PrefillOutput output;
  if (count == left && sequence.request.max_new_tokens > 0) output.sampled = &sampled;

  const std::span<const TokenId> next_tokens =
      detail ? std::span<const TokenId>(sequence.request.prompt)
                   .subspan(sequence.prefilled + 1, std::min(count, left - 1))
             : std::span<const TokenId>();
  std::vector<ScoredToken> scores(next_tokens.size());
  result_of(sequence).statistics.prefill_seconds += prefill_scored(
      *backend_, *sequence.handle, piece, next_tokens, detail.value_or(ScoreDetail{}), scores,
      output, [this] { return is_cancelled(); });
  std::ranges::move(scores, std::back_inserter(result_of(sequence).prompt_scores));
  sequence.prefilled += count;
  if (count < left) return;
  if (sequence.request.max_new_tokens == 0) {
    emit(sequence, last_event(sequence.index, FinishReason::token_limit));
    return;
  }
  result_of(sequence).statistics.time_to_first_token_seconds = seconds_since(started_);
  accept(sequence, std::move(sampled));
}

// No sequence may grow past its limit, not even for a token that is then dropped.
std::int32_t BatchGeneration::num_steps() const {
  std::int64_t steps = backend_->info().decode_ahead;
  for (const Sequence& sequence : sequences_) {
    steps =
        std::min(steps, sequence.request.max_new_tokens - std::ssize(result_of(sequence).tokens));
  }
  return static_cast<std::int32_t>(steps);
}

// Bytes that the whole batch reads in the `step`-th step from now: the weights once, and the keys
// and values of each sequence up to the position that the step appends.
double BatchGeneration::step_bytes(std::int64_t step) const {
  std::int64_t positions = 0;
  for (const Sequence& sequence : sequences_) {
    positions +=
        std::ssize(sequence.request.prompt) + std::ssize(result_of(sequence).tokens) + step;
  }
  return static_cast<double>(backend_->model().bytes_per_token()) +
         static_cast<double>(positions) *
             static_cast<double>(backend_->info().kv_bytes_per_position);
}

void BatchGeneration::decode_batch() {
  const std::size_t batch = sequences_.size();
  const std::int32_t steps = num_steps();
  std::vector<SequenceId> ids;
  std::vector<TokenId> inputs;
  for (const Sequence& sequence : sequences_) {
    ids.push_back(sequence.handle->id());
    inputs.push_back(result_of(sequence).tokens.back());
  }
  std::vector<SampledToken> sampled(batch * static_cast<std::size_t>(steps));
  double bytes = 0;
  for (std::int32_t step = 0; step < steps; ++step) bytes += step_bytes(step);

  const double seconds = backend_->run(
      [&](Backend& backend) {
        const Clock::time_point start = Clock::now();
        backend.decode(ids, inputs, steps, sampled, {});
        return seconds_since(start);
      },
      [this] { return is_cancelled(); });
  for (Sequence& sequence : sequences_) {
    result_of(sequence).statistics.decode_seconds += seconds;
    sequence.decode_bytes += bytes;
  }
  // A sequence that ends before the last step leaves its surplus tokens behind with its pages.
  for (std::size_t i = 0; i < sampled.size(); ++i) {
    Sequence& sequence = sequences_[i % batch];
    if (sequence.handle) accept(sequence, std::move(sampled[i]));
  }
}

void BatchGeneration::accept(Sequence& sequence, SampledToken token) {
  GenerateResult& result = result_of(sequence);
  GenerateEvent event;
  event.index = sequence.index;
  result.tokens.push_back(token.token);
  if (sequence.request.sampling.num_logprobs >= 0) result.sampled.push_back(token);

  if (std::ranges::count(sequence.request.stop_tokens, token.token) > 0) {
    event.finish_reason = FinishReason::stop_token;
  } else {
    event.text = sequence.text.push(token.token);
    event.finish_reason =
        sequence.text.stopped() ? FinishReason::stop_string : limit_reached(sequence);
  }
  event.token = std::move(token);
  emit(sequence, std::move(event));
}

std::optional<FinishReason> BatchGeneration::limit_reached(const Sequence& sequence) const {
  if (std::ssize(result_of(sequence).tokens) < sequence.request.max_new_tokens) return std::nullopt;
  return sequence.request.ends_at_context ? FinishReason::context_limit : FinishReason::token_limit;
}

void BatchGeneration::emit(Sequence& sequence, GenerateEvent event) {
  if (event.finish_reason) {
    event.text += sequence.text.finish();
    if (sequence.text.stopped()) event.finish_reason = FinishReason::stop_string;
    result_of(sequence).finish_reason = *event.finish_reason;
    sequence.handle.reset();
  }
  result_of(sequence).text += event.text;
  update_statistics(sequence);
  events_.push_back(std::move(event));
}

void BatchGeneration::update_statistics(Sequence& sequence) {
  GenerateResult& result = result_of(sequence);
  Statistics& statistics = result.statistics;
  statistics.new_tokens = std::ssize(result.tokens);
  statistics.read_ceiling_bytes_per_second = backend_->known_read_ceiling();
  if (statistics.new_tokens < 2 || statistics.decode_seconds <= 0) return;
  statistics.seconds_per_token =
      statistics.decode_seconds / static_cast<double>(statistics.new_tokens - 1);
  statistics.tokens_per_second = 1 / statistics.seconds_per_token;
  statistics.bytes_per_second = sequence.decode_bytes / statistics.decode_seconds;
  if (statistics.read_ceiling_bytes_per_second > 0) {
    statistics.ceiling_share =
        statistics.bytes_per_second / statistics.read_ceiling_bytes_per_second;
  }
}

void BatchGeneration::drop_finished() {
  std::erase_if(sequences_, [](const Sequence& sequence) { return sequence.handle == nullptr; });
}

}  // namespace clusterfusion
