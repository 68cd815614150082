// Continuous batching: which sequences compute what, and when.
//
// A thread of its own works in rounds. In each, with the backend's turn (SharedBackend), it
// 1. drops sequences whose callers have cancelled them;
// 2. admits waiting ones while there are places and pages: first those that were preempted, then
//    the one whose caller has the fewest active, then by arrival. It leaves a page for each active
//    sequence, so that none has to be preempted soon;
// 3. computes pieces of prompts, callers in turns, several in a pass where the device packs them.
//    Beside streams of other callers that is one pass, and more only within the time of one decode
//    step: no stream waits for longer than a pass and a step. (Where pieces may have any size, a
//    pass takes as long as a step.) A caller's own streams wait until its admitted prompts are
//    read: then all share their steps;
// 4. decodes a burst of steps for all that decode: one step where prompts wait, else as many as
//    take StepClock::kLongestBurstSeconds. Where a draft has something to propose for one of them
//    (speculation.hpp), it is one step that verifies it.
//
// Pages. Before a sequence grows, cached prefixes that nobody uses make room, least recently used
// first; then the youngest active sequence is preempted: its pages go, its tokens stay. The last
// one is never preempted, so that somebody always comes to an end.
//
// Recomputing gives the same text bit for bit. Where decoding gives the bits of prefilling
// (BackendInfo::decodes_as_prefills) the prompt and the tokens behind it are prefilled together.
// Elsewhere the prompt is prefilled in its own pieces, and the tokens are decoded again, as they
// were the first time: they depend on the request alone, so they come out the same, which is
// checked.
//
// Errors. One that concerns a single sequence (non_finite, invalid_argument) ends its caller's
// sequences and no others': a batch that fails is tried again one by one. Others end all that took
// part.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/condition_variable.hpp"
#include "engine/scheduled_sequence.hpp"
#include "engine/shared_backend.hpp"
#include "engine/step_clock.hpp"

namespace clusterfusion {

struct DraftCandidate;
class Speculation;

struct SchedulerOptions {
  std::int64_t max_sequences = 256;  // active at once
  bool prefix_cache = true;
  std::function<double()> now = {};  // seconds; empty: the machine's clock
  // Used where the device verifies several tokens in a step; null: none.
  std::unique_ptr<Draft> draft = nullptr;
  std::int32_t draft_tokens = 8;  // proposed for a text in one step, at most
  bool draft_adapts = true;       // fewer, or none, where they do not pay
};

class Scheduler {
 public:
  using Sequences = std::vector<std::unique_ptr<ScheduledSequence>>;

  Scheduler(std::shared_ptr<SharedBackend> backend, SchedulerOptions options);
  // No caller may have sequences left.
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Sequences of one caller. From any thread.
  void submit(Sequences sequences);
  // Cancels the caller's sequences and returns when they are gone. From any thread but its own.
  void withdraw(Caller& caller);
  // Cancels them and does not wait. Also from a signal handler.
  void ask_to_withdraw(Caller& caller) noexcept;
  ServingStatistics statistics() const;

  // scheduler_saved_pages.cpp: pages of the prefix cache that are saved to files and come from
  // there. From any thread: each call takes a turn of the backend, as the scheduler's rounds do.
  bool has_prefix_cache() const noexcept { return options_.prefix_cache; }
  // The first pages of `tokens` that are in the cache; none of them is evicted before
  // unpin_pages().
  PrefixCache::Chain pin_pages(std::span<const TokenId> tokens);
  void unpin_pages(const PrefixCache::Chain& chain);
  void read_page(const PrefixCache::Entry& entry, std::span<std::byte> content);
  // Puts the page behind `chain`, of these tokens, into the cache, unless it is there, and appends
  // it to the chain, pinned. Errors: out_of_memory.
  void add_page(PrefixCache::Chain& chain, std::span<const TokenId> tokens,
                std::span<const std::byte> content);

 private:
  using Sequence = ScheduledSequence;
  using Members = std::vector<Sequence*>;

  // scheduler.cpp: the thread and its rounds.
  void work();
  bool wait_for_work();
  void take_submitted();
  void round(Backend& backend);
  bool is_step_unwanted() const;
  void deliver();
  void fail_all(const std::exception_ptr& error);
  void note_statistics(Backend& backend);

  // scheduler_pages.cpp: who is active, and on which pages.
  void drop_unwanted(Backend& backend);
  void admit(Backend& backend);
  Sequence* next_to_admit() const;
  bool try_to_activate(Backend& backend, Sequence& sequence);
  void note_admission(Sequence& sequence, std::int64_t cached_positions);
  PrefixCache::Chain find_prefix(const Sequence& sequence);
  bool uses_cache(const Sequence& sequence) const;
  std::int64_t free_pages(Backend& backend) const;
  bool has_room(Backend& backend, std::int64_t pages) const;
  bool evict(Backend& backend);
  bool grow(Backend& backend, Sequence& sequence, std::int64_t positions);
  bool make_room(Backend& backend);
  void preempt(Backend& backend, Sequence& sequence);
  void deactivate(Backend& backend, Sequence& sequence);
  void publish_pages(Backend& backend, Sequence& sequence);
  void sweep();

  // scheduler_steps.cpp: what active ones compute.
  bool prefill(Backend& backend);
  Members prefilling() const;
  bool disturbs_others(const Sequence& sequence) const;
  std::int64_t piece_of(const Sequence& sequence, bool beside_streams) const;
  // A piece of a prompt in a pass, and what comes of it.
  struct Piece {
    Sequence* sequence;
    std::int64_t count;
    SampledToken sampled = {};
    std::vector<float> logits = {};
    std::vector<ScoredToken> scores = {};
    std::optional<ScoredPiece> scored = {};

    bool is_last() const { return sequence->length + count == std::ssize(sequence->fed); }
  };
  std::vector<Piece> next_pieces(const Members& waiting, bool beside_streams) const;
  void prefill_pieces(Backend& backend, std::vector<Piece> pieces);
  void compute_pieces(Backend& backend, std::vector<Piece>& pieces);
  void compute_apart(Backend& backend, std::vector<Piece>& pieces, const Error& error);
  PrefillPart prepare(Piece& piece) const;
  void take(Backend& backend, Piece& piece);
  void post_scores(Sequence& sequence, std::size_t begin, std::vector<ScoredToken>& scores);
  void finish_prefill(Backend& backend, Sequence& sequence, SampledToken sampled,
                      std::span<const float> logits);
  void share_prompt(Backend& backend, Sequence& first, std::span<const float> logits);
  Members waiting_samples(const Sequence& first) const;
  void decode(Backend& backend);
  std::int32_t burst_of(const Members& members) const;
  void decode_members(Backend& backend, const Members& members, std::int32_t steps);
  void decode_apart(Backend& backend, const Members& members, const Error& error);
  double step_bytes(const Members& members, std::int64_t step) const;
  static void note_decode(const Members& members, double seconds, double bytes, std::int32_t steps);
  void accept(Backend& backend, Sequence& sequence, SampledToken token);
  void finish(Backend& backend, Sequence& sequence, SequenceNews news);
  SequenceNews news_of(const Sequence& sequence) const;
  void fail_caller(Backend& backend, Caller& caller, const std::exception_ptr& error);
  void post(Sequence& sequence, SequenceNews news);

  // scheduler_drafts.cpp: steps that verify what a draft proposes.
  void prepare_speculation(std::unique_ptr<Draft> draft);
  bool decode_proposals(Backend& backend, const Members& members);
  DraftCandidate candidate_of(Sequence& sequence);
  void drop_what_has_no_room(Backend& backend, const Members& members,
                             std::span<DraftCandidate> candidates) const;
  void verify(Backend& backend, const Members& members, std::span<const DraftCandidate> candidates,
              double start);
  double verified_bytes(const Members& members, std::span<const Proposal> batch) const;

  const BackendInfo& info() const noexcept { return backend_->info(); }
  double now() const { return options_.now(); }

  std::shared_ptr<SharedBackend> backend_;
  SchedulerOptions options_;

  // The thread's own.
  Sequences waiting_;  // by arrival
  Sequences active_;   // by arrival; also those that have just ended, until sweep()
  PrefixCache cache_;  // and of whoever has the backend's turn
  StepClock clock_;
  std::unique_ptr<Speculation> speculation_;  // null without a draft
  Members step_members_;                      // of the step that runs
  std::vector<std::shared_ptr<Caller>> callers_with_news_;
  std::uint64_t round_ = 0;
  std::uint64_t next_arrival_ = 0;
  ServingStatistics totals_;

  mutable std::mutex mutex_;  // of what follows
  ConditionVariable work_came_;
  Sequences submitted_;
  ServingStatistics published_;
  bool stop_ = false;

  std::atomic<bool> withdrawals_ = false;  // some caller is cancelled: look at those that wait
  const int process_;                      // that the thread is in
  std::thread thread_;
};

}  // namespace clusterfusion
