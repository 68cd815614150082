#include "engine/generation.hpp"

#include <algorithm>
#include <iterator>
#include <map>

namespace clusterfusion {
namespace {

// A cancellation by a signal handler, which cannot wake anybody, is seen after this time. Asking
// whether the caller was interrupted may cost something (in Python the interpreter's lock).
constexpr std::chrono::milliseconds kPatience{20};

}  // namespace

BatchGeneration::BatchGeneration(std::shared_ptr<SharedBackend> backend,
                                 std::shared_ptr<Scheduler> scheduler,
                                 const std::shared_ptr<const Tokenizer>& tokenizer,
                                 std::vector<Request> requests, std::function<void()> on_news)
    : backend_(std::move(backend)),
      scheduler_(std::move(scheduler)),
      caller_(std::make_shared<Caller>(std::move(on_news))),
      results_(requests.size()),
      num_running_(requests.size()) {
  const std::shared_ptr<const Interventions> interventions = backend_->interventions().now();
  std::map<std::size_t, std::shared_ptr<PromptFamily>> families;
  Scheduler::Sequences sequences;
  for (std::size_t index = 0; index < requests.size(); ++index) {
    PreparedRequest& request = requests[index].prepared;
    results_[index].prompt_tokens = request.prompt;
    results_[index].statistics.prompt_tokens = std::ssize(request.prompt);
    const TextStream text(tokenizer, request.skip_special_tokens, request.stop_strings,
                          request.prompt);
    readers_.push_back({text, request.sampling.num_logprobs >= 0, false});
    if (request.max_new_tokens == 0 && !request.prompt_detail) {
      GenerateEvent event;
      event.index = index;
      event.finish_reason = FinishReason::token_limit;
      emit(std::move(event));
      continue;
    }
    auto sequence = std::make_unique<ScheduledSequence>();
    sequence->caller = caller_;
    sequence->index = index;
    if (!request.stop_strings.empty()) {
      sequence->ends_text = [text = TextStream(text)](TokenId token) mutable {
        text.push(token);
        return text.stopped();
      };
    }
    std::shared_ptr<PromptFamily>& family = families[requests[index].prompt_number];
    if (!family) family = std::make_shared<PromptFamily>();
    sequence->family = family;
    sequence->interventions = interventions;
    sequence->statistics.prompt_tokens = std::ssize(request.prompt);
    sequence->request = std::move(request);
    sequences.push_back(std::move(sequence));
  }
  scheduler_->submit(std::move(sequences));
}

BatchGeneration::~BatchGeneration() { scheduler_->withdraw(*caller_); }

std::optional<GenerateEvent> BatchGeneration::next() {
  for (;;) {
    if (!all_ended() && caller_->is_cancelled()) end_all(FinishReason::cancelled);
    if (!events_.empty()) {
      GenerateEvent event = std::move(events_.front());
      events_.pop_front();
      return event;
    }
    if (all_ended()) return std::nullopt;
    try {
      check_interrupted();
      if (news_.empty()) news_ = caller_->wait_for_news(kPatience);
    } catch (...) {
      num_running_ = 0;
      throw;
    }
    if (news_.empty()) continue;
    SequenceNews news = std::move(news_.front());
    news_.pop_front();
    read(std::move(news));
  }
}

std::vector<GenerateEvent> BatchGeneration::take() {
  if (all_ended() || !caller_->is_cancelled()) {
    try {
      std::ranges::move(caller_->take_news(), std::back_inserter(news_));
    } catch (...) {
      num_running_ = 0;
      throw;
    }
    for (; !news_.empty(); news_.pop_front()) read(std::move(news_.front()));
  } else if (caller_->has_ended()) {
    end_all(FinishReason::cancelled);
  }
  std::deque<GenerateEvent> events = std::exchange(events_, {});
  return {std::move_iterator(events.begin()), std::move_iterator(events.end())};
}

void BatchGeneration::check_interrupted() {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_question_) return;
  next_question_ = now + kPatience;
  if (!backend_->ask_interrupted()) return;
  end_all(FinishReason::cancelled);
  events_.clear();
  SharedBackend::fail_interrupted();
}

void BatchGeneration::read(SequenceNews news) {
  GenerateResult& result = results_[news.index];
  std::ranges::move(news.prompt_scores, std::back_inserter(result.prompt_scores));
  if (news.token) {
    result.tokens.push_back(news.token->token);
    if (readers_[news.index].wants_sampled) result.sampled.push_back(*news.token);
  }
  update_statistics(result, news);
  if (!news.token && !news.finish_reason) return;
  GenerateEvent event;
  event.index = news.index;
  event.finish_reason = news.finish_reason;
  if (news.token && news.finish_reason != FinishReason::stop_token) {
    event.text = readers_[news.index].text.push(news.token->token);
  }
  event.token = std::move(news.token);
  emit(std::move(event));
}

// A finish reason ends the sequence, with the text that was held back.
void BatchGeneration::emit(GenerateEvent event) {
  GenerateResult& result = results_[event.index];
  Reader& reader = readers_[event.index];
  if (event.finish_reason) {
    event.text += reader.text.finish();
    if (reader.text.stopped()) event.finish_reason = FinishReason::stop_string;
    result.finish_reason = *event.finish_reason;
    reader.ended = true;
    --num_running_;
  }
  result.text += event.text;
  events_.push_back(std::move(event));
}

// Of the sequences that have not ended; what they still had to tell is forgotten.
void BatchGeneration::end_all(FinishReason reason) {
  scheduler_->withdraw(*caller_);
  news_.clear();
  for (std::size_t index = 0; index < readers_.size(); ++index) {
    if (readers_[index].ended) continue;
    GenerateEvent event;
    event.index = index;
    event.finish_reason = reason;
    emit(std::move(event));
  }
}

void BatchGeneration::update_statistics(GenerateResult& result, const SequenceNews& news) {
  Statistics& statistics = result.statistics;
  statistics = news.statistics;
  statistics.new_tokens = std::ssize(result.tokens);
  if (statistics.draft_steps > 0) {
    statistics.mean_accepted = static_cast<double>(statistics.draft_accepted) /
                               static_cast<double>(statistics.draft_steps);
  }
  statistics.read_ceiling_bytes_per_second = backend_->known_read_ceiling();
  if (statistics.new_tokens < 2 || statistics.decode_seconds <= 0) return;
  statistics.seconds_per_token =
      statistics.decode_seconds / static_cast<double>(statistics.new_tokens - 1);
  statistics.tokens_per_second = 1 / statistics.seconds_per_token;
  statistics.bytes_per_second = news.decode_bytes / statistics.decode_seconds;
  if (statistics.read_ceiling_bytes_per_second > 0) {
    statistics.ceiling_share =
        statistics.bytes_per_second / statistics.read_ceiling_bytes_per_second;
  }
}

}  // namespace clusterfusion
