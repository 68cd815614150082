// A running Generation: the caller's side of the scheduler, with texts and results.
#pragma once

#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "clusterfusion/engine.hpp"
#include "engine/caller.hpp"
#include "engine/prepare_request.hpp"
#include "engine/scheduler.hpp"
#include "engine/shared_backend.hpp"
#include "engine/text_stream.hpp"

namespace clusterfusion {

// The scheduler computes ahead of next(), which turns tokens into text and adds them to the
// results.
//
// - A request for 0 new tokens computes nothing, unless its prompt is to be scored: its one event
//   says token_limit.
// - If several reasons to finish hold at once, the first of these is given: stop_string (the end of
//   a text, a stop token for one, may show that the text held back has one), stop_token,
//   token_limit, context_limit.
// - A context limit of n means that prompt and new tokens together are at most n.
// - cancel() ends each sequence behind the tokens that have come out, with one event that brings
//   the text held back. next() returns it when the sequences are gone, and their memory is free.
// - An interruption ends the results in the same way, but the error takes the place of events.
class BatchGeneration final : public Generation {
 public:
  // `requests` in the order of results; those with the same prompt number are samples of one
  // prompt. Submits them.
  struct Request {
    PreparedRequest prepared;
    std::size_t prompt_number = 0;
  };
  BatchGeneration(std::shared_ptr<SharedBackend> backend, std::shared_ptr<Scheduler> scheduler,
                  const std::shared_ptr<const Tokenizer>& tokenizer, std::vector<Request> requests,
                  std::function<void()> on_news);
  ~BatchGeneration() override;

  std::optional<GenerateEvent> next() override;
  std::vector<GenerateEvent> take() override;
  bool has_ended() const noexcept override { return all_ended() && events_.empty(); }
  void cancel() noexcept override { scheduler_->ask_to_withdraw(*caller_); }
  const std::vector<GenerateResult>& results() const noexcept override { return results_; }

 private:
  // What the caller has seen of a sequence.
  struct Reader {
    TextStream text;
    bool wants_sampled = false;
    bool ended = false;
  };

  bool all_ended() const noexcept { return num_running_ == 0; }
  void read(SequenceNews news);
  void end_all(FinishReason reason);
  void emit(GenerateEvent event);
  void update_statistics(GenerateResult& result, const SequenceNews& news);
  // Errors: interrupted.
  void check_interrupted();

  std::shared_ptr<SharedBackend> backend_;
  std::shared_ptr<Scheduler> scheduler_;
  std::shared_ptr<Caller> caller_;
  std::vector<GenerateResult> results_;
  std::vector<Reader> readers_;  // one for each result
  std::size_t num_running_ = 0;  // results without a last event
  std::deque<SequenceNews> news_;
  std::deque<GenerateEvent> events_;
  std::chrono::steady_clock::time_point next_question_;  // whether the caller was interrupted
};

}  // namespace clusterfusion
