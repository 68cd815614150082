#include "engine/scheduler.hpp"

#include <unistd.h>

#include <algorithm>
#include <iterator>

#include "base/fail.hpp"
#include "engine/speculation.hpp"

namespace clusterfusion {

const char* name_of(SequenceState state) noexcept {
  switch (state) {
    case SequenceState::waiting: return "waiting";
    case SequenceState::prefilling: return "prefilling";
    case SequenceState::decoding: return "decoding";
    case SequenceState::replaying: return "replaying";
    case SequenceState::preempted: return "preempted";
    case SequenceState::finished: return "finished";
  }
  return "unknown";
}

Scheduler::Scheduler(std::shared_ptr<SharedBackend> backend, SchedulerOptions options)
    : backend_(std::move(backend)), options_(std::move(options)), process_(::getpid()) {
  if (!options_.now) options_.now = machine_seconds;
  prepare_speculation(std::move(options_.draft));
  totals_.kv_pages = published_.kv_pages = info().kv_pages;
  thread_ = std::thread([this] { work(); });
}

Scheduler::~Scheduler() {
  if (::getpid() != process_) {  // a fork, which has no such thread
    thread_.detach();
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_came_.notify_all();
  thread_.join();
}

void Scheduler::submit(Sequences sequences) {
  if (sequences.empty()) return;
  require(::getpid() == process_, ErrorKind::unsupported,
          "this engine was made in process {}, of which this one ({}) is a fork: the thread that "
          "generates is not in it; make an engine in each process, or start processes by \"spawn\"",
          process_, ::getpid());
  sequences.front()->caller->expect(std::ssize(sequences));
  {
    const std::lock_guard lock(mutex_);
    for (auto& sequence : sequences) {
      sequence->waiting_since = now();
      submitted_.push_back(std::move(sequence));
    }
  }
  work_came_.notify_all();
}

void Scheduler::ask_to_withdraw(Caller& caller) noexcept {
  caller.cancel();
  withdrawals_.store(true);
}

void Scheduler::withdraw(Caller& caller) {
  ask_to_withdraw(caller);
  caller.wait_for_end();
}

ServingStatistics Scheduler::statistics() const {
  const std::lock_guard lock(mutex_);
  return published_;
}

void Scheduler::work() {
  while (wait_for_work()) {
    take_submitted();
    try {
      backend_->run_unasked([this](Backend& backend) { round(backend); },
                            [this] { return is_step_unwanted(); });
    } catch (const Stopped&) {
      // What the step was for is dropped by the next round.
    } catch (...) {
      fail_all(std::current_exception());
    }
    step_members_.clear();
    sweep();
    deliver();
  }
}

// False when the scheduler is to end.
bool Scheduler::wait_for_work() {
  std::unique_lock lock(mutex_);
  work_came_.wait(lock, [this] {
    return stop_ || !submitted_.empty() || !waiting_.empty() || !active_.empty();
  });
  return !stop_;
}

void Scheduler::take_submitted() {
  const std::lock_guard lock(mutex_);
  for (auto& sequence : submitted_) {
    // Its withdrawal may have been noted before it was here.
    if (sequence->caller->is_cancelled()) withdrawals_.store(true);
    sequence->arrival = next_arrival_++;
    waiting_.push_back(std::move(sequence));
  }
  submitted_.clear();
}

void Scheduler::round(Backend& backend) {
  ++round_;
  drop_unwanted(backend);
  admit(backend);
  const bool reads_more = prefill(backend);
  note_statistics(backend);
  deliver();  // first tokens need not wait for a burst
  if (!reads_more) decode(backend);
  note_statistics(backend);
}

// The step that runs is given up if nobody wants it any more.
bool Scheduler::is_step_unwanted() const {
  return !step_members_.empty() && std::ranges::all_of(step_members_, [](const Sequence* member) {
    return member->caller->is_cancelled();
  });
}

// Nothing that was computed from files which had lost bytes: fail_all() comes then.
void Scheduler::deliver() {
  if (backend_->model().find_lost_file()) return;
  for (const std::shared_ptr<Caller>& caller : callers_with_news_) {
    caller->post(std::exchange(caller->outbox, {}), std::exchange(caller->num_ended, 0));
  }
  callers_with_news_.clear();
}

void Scheduler::fail_all(const std::exception_ptr& error) {
  std::vector<std::shared_ptr<Caller>> callers;
  deliver();
  // What could not be delivered is dropped.
  for (const auto& caller : callers_with_news_) caller->outbox.clear();
  std::ranges::move(std::exchange(callers_with_news_, {}), std::back_inserter(callers));
  for (const Sequences* sequences : {&waiting_, &active_}) {
    for (const auto& sequence : *sequences) callers.push_back(sequence->caller);
  }
  try {
    backend_->run_unasked([&](Backend& backend) {
      for (const auto& sequence : active_) {
        if (sequence->is_active()) deactivate(backend, *sequence);
      }
    });
  } catch (...) {
    // What cannot be released stays with the backend, which goes with the engine.
  }
  waiting_.clear();
  active_.clear();
  for (const auto& caller : callers) caller->fail(error);
}

void Scheduler::note_statistics(Backend& backend) {
  totals_.kv_pages = info().kv_pages;
  totals_.kv_pages_in_use = backend.kv_pages_in_use();
  totals_.kv_pages_cached = cache_.num_evictable();
  totals_.sequences_waiting = std::ssize(waiting_);
  totals_.sequences_active =
      std::ranges::count_if(active_, [](const auto& sequence) { return sequence->is_active(); });
  const std::lock_guard lock(mutex_);
  published_ = totals_;
}

}  // namespace clusterfusion
