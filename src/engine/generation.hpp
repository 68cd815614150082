// The generate loop: prefill in pieces, decode in batches, events in a queue.
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "clusterfusion/engine.hpp"
#include "engine/prepare_request.hpp"
#include "engine/shared_backend.hpp"
#include "engine/text_stream.hpp"

namespace clusterfusion {

// Prompts are prefilled one after the other; then all sequences that have not ended decode as one
// batch. Which sequences share a batch does not change their tokens.
//
// - A request for 0 new tokens computes nothing, unless its prompt is to be scored: its one event
//   says token_limit.
// - If several reasons to finish hold at once, the first of these is given: stop_string (the end of
//   a text, a stop token for one, may show that the text held back has one), stop_token,
//   token_limit, context_limit.
// - A context limit of n means that prompt and new tokens together are at most n.
// - cancel() lets tokens that are already computed come out, gives up the step that runs, and ends
//   each sequence with one event that brings the text held back.
// - An interrupted step ends the results in the same way, but the error takes the place of events.
class BatchGeneration final : public Generation {
 public:
  using Clock = std::chrono::steady_clock;

  // Reserves the KV pages of all sequences. Errors: those of SequenceHandle.
  BatchGeneration(std::shared_ptr<SharedBackend> backend,
                  std::shared_ptr<const Tokenizer> tokenizer, std::vector<PreparedRequest> requests,
                  Clock::time_point started);

  std::optional<GenerateEvent> next() override;
  void cancel() noexcept override { cancelled_.store(true, std::memory_order_relaxed); }
  const std::vector<GenerateResult>& results() const noexcept override { return results_; }

 private:
  struct Sequence {
    std::size_t index;  // of the request and its result
    PreparedRequest request;
    TextStream text;
    std::unique_ptr<SequenceHandle> handle;
    std::int64_t prefilled = 0;  // prompt tokens in the backend
    double decode_bytes = 0;     // read by the decode steps that it took part in

    bool in_prefill() const noexcept { return prefilled < std::ssize(request.prompt); }
  };

  // Does one prefill piece or one decode step, or cancels; false if there is nothing left to do.
  bool advance();
  void advance_sequences();
  void cancel_sequences();
  void prefill_piece(Sequence& sequence);
  void decode_batch();
  std::int32_t num_steps() const;
  double step_bytes(std::int64_t step) const;
  bool is_cancelled() const noexcept { return cancelled_.load(std::memory_order_relaxed); }

  // Takes note of a new token and decides whether the sequence goes on.
  void accept(Sequence& sequence, SampledToken token);
  std::optional<FinishReason> limit_reached(const Sequence& sequence) const;
  // Sends the event; a finish reason ends the sequence and gives its pages back.
  void emit(Sequence& sequence, GenerateEvent event);
  void update_statistics(Sequence& sequence);
  void drop_finished();

  GenerateResult& result_of(const Sequence& sequence) { return results_[sequence.index]; }
  const GenerateResult& result_of(const Sequence& sequence) const {
    return results_[sequence.index];
  }

  std::shared_ptr<SharedBackend> backend_;
  const Clock::time_point started_;
  std::vector<GenerateResult> results_;
  std::vector<Sequence> sequences_;  // those that have not ended
  std::deque<GenerateEvent> events_;

  std::atomic<bool> cancelled_ = false;
  static_assert(std::atomic<bool>::is_always_lock_free, "cancel() is for signal handlers");
};

}  // namespace clusterfusion
