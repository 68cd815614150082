// Who is active, and on which pages.
#include <algorithm>
#include <iterator>
#include <tuple>
#include <utility>

#include "engine/scheduler.hpp"

namespace clusterfusion {
namespace {

bool has_ended(const std::unique_ptr<ScheduledSequence>& sequence) {
  return sequence->state == SequenceState::finished;
}

}  // namespace

void Scheduler::drop_unwanted(Backend& backend) {
  const bool some_cancelled = withdrawals_.exchange(false);
  const auto drop = [&](Sequences& sequences) {
    for (const auto& sequence : sequences) {
      if (!sequence->caller->is_cancelled() || has_ended(sequence)) continue;
      if (sequence->is_active()) deactivate(backend, *sequence);
      sequence->state = SequenceState::finished;
      if (sequence->caller->num_ended++ == 0) callers_with_news_.push_back(sequence->caller);
    }
  };
  drop(active_);
  if (some_cancelled || active_.empty()) drop(waiting_);
  sweep();
}

// Ended sequences go; preempted ones wait again.
void Scheduler::sweep() {
  step_members_.clear();
  std::erase_if(active_, has_ended);
  std::erase_if(waiting_, has_ended);
  const auto by_arrival = [](const auto& a, const auto& b) { return a->arrival < b->arrival; };
  const auto move_over = [&](Sequences& from, Sequences& to, auto belongs_there) {
    const auto rest = std::stable_partition(from.begin(), from.end(), std::not_fn(belongs_there));
    if (rest == from.end()) return;
    std::move(rest, from.end(), std::back_inserter(to));
    from.erase(rest, from.end());
    std::ranges::sort(to, by_arrival);
  };
  move_over(active_, waiting_, [](const auto& sequence) { return !sequence->is_active(); });
  move_over(waiting_, active_, [](const auto& sequence) { return sequence->is_active(); });
}

void Scheduler::admit(Backend& backend) {
  while (std::ssize(active_) < options_.max_sequences) {
    Sequence* const sequence = next_to_admit();
    if (sequence == nullptr || !try_to_activate(backend, *sequence)) return;
    sweep();
  }
}

Scheduler::Sequence* Scheduler::next_to_admit() const {
  const auto rank = [](const Sequence& s) {
    return std::tuple(s.state != SequenceState::preempted,
                      s.state == SequenceState::preempted ? 0 : s.caller->num_active, s.arrival);
  };
  Sequence* best = nullptr;
  for (const auto& sequence : waiting_) {
    const bool waits_for_prompt = sequence->family && sequence->family->num_prefilling > 0;
    if (waits_for_prompt) continue;
    if (best == nullptr || rank(*sequence) < rank(*best)) best = sequence.get();
  }
  return best;
}

// False if there are no pages for what the sequence is to be fed. Else it has become active, or its
// caller's sequences have ended because the device could not make it.
bool Scheduler::try_to_activate(Backend& backend, Sequence& sequence) {
  sequence.fed = sequence.request.prompt;
  sequence.num_computed = 0;
  if (info().decodes_as_prefills) {
    sequence.fed.insert(sequence.fed.end(), sequence.tokens.begin(), sequence.tokens.end());
    sequence.num_computed = sequence.tokens.size();
  }
  sequence.chain = find_prefix(sequence);
  const auto cached = std::ssize(sequence.chain);
  if (!has_room(backend, kv_pages_of(std::ssize(sequence.fed) + 1) - cached)) {
    cache_.unpin(sequence.chain);
    return false;
  }
  std::vector<KvPageId> pages;
  for (const PrefixCache::Entry* entry : sequence.chain) {
    pages.push_back(PrefixCache::page_of(*entry));
  }
  const std::int64_t positions = cached * kKvPagePositions;
  try {
    sequence.id =
        backend.create_sequence(sequence.request.sampling,
                                std::span(sequence.fed).first(static_cast<std::size_t>(positions)),
                                pages, sequence.interventions);
  } catch (const Error& error) {
    cache_.unpin(std::exchange(sequence.chain, {}));
    fail_caller(backend, *sequence.caller, backend_->explained(error));
    return true;
  }
  sequence.length = positions;
  sequence.num_pages = cached;
  sequence.shares_last_page = false;
  if (sequence.family) ++sequence.family->num_prefilling;
  note_admission(sequence, positions);
  sequence.state = SequenceState::prefilling;
  return true;
}

// Before its state changes.
void Scheduler::note_admission(Sequence& sequence, std::int64_t cached_positions) {
  ++sequence.caller->num_active;
  sequence.statistics.queue_seconds += now() - sequence.waiting_since;
  if (sequence.state == SequenceState::preempted) return;
  totals_.prompt_tokens += std::ssize(sequence.request.prompt);
  totals_.prefix_hit_tokens += cached_positions;
  sequence.statistics.prefix_hit_tokens = cached_positions;
}

// The pages of its beginning that are in the cache. At least one token is left to prefill, for its
// logits.
PrefixCache::Chain Scheduler::find_prefix(const Sequence& sequence) {
  if (!uses_cache(sequence) || sequence.wants_scores()) return {};
  return cache_.find(sequence.fed, (std::ssize(sequence.fed) - 1) / kKvPagePositions);
}

// Its pages are those of any text with the same tokens. What interventions have changed is not.
bool Scheduler::uses_cache(const Sequence& sequence) const {
  return options_.prefix_cache && sequence.interventions == nullptr;
}

std::int64_t Scheduler::free_pages(Backend& backend) const {
  return info().kv_pages - backend.kv_pages_in_use();
}

// Besides one for each active sequence. Whoever is alone may try.
bool Scheduler::has_room(Backend& backend, std::int64_t pages) const {
  return active_.empty() ||
         pages + std::ssize(active_) <= free_pages(backend) + cache_.num_evictable();
}

// False if there is nothing to evict.
bool Scheduler::evict(Backend& backend) {
  const std::optional<KvPageId> page = cache_.evict();
  if (page) backend.drop_page(*page);
  return page.has_value();
}

// Reserves the positions. False if the sequence itself had to go.
bool Scheduler::grow(Backend& backend, Sequence& sequence, std::int64_t positions) {
  const std::int64_t pages = kv_pages_of(positions);
  const std::int64_t more = pages - sequence.num_pages + (sequence.shares_last_page ? 1 : 0);
  while (more > 0 && more > free_pages(backend) && make_room(backend)) {
    if (!sequence.is_active()) return false;
  }
  for (;;) {
    try {
      backend.reserve(sequence.id, positions);
      break;
    } catch (const Error& error) {  // the machine has less than we thought
      if (error.kind() != ErrorKind::out_of_memory || !make_room(backend)) {
        fail_caller(backend, *sequence.caller, std::make_exception_ptr(error));
      }
      if (!sequence.is_active()) return false;
    }
  }
  sequence.num_pages = std::max(sequence.num_pages, pages);
  sequence.shares_last_page = false;
  return true;
}

// By a cached page, or all pages of the youngest; false if the only active sequence has the rest.
bool Scheduler::make_room(Backend& backend) {
  if (evict(backend)) return true;
  Sequence* youngest = nullptr;
  int num_active = 0;
  for (const auto& sequence : active_) {
    if (!sequence->is_active()) continue;
    ++num_active;
    if (youngest == nullptr || sequence->arrival > youngest->arrival) youngest = sequence.get();
  }
  if (num_active < 2) return false;
  preempt(backend, *youngest);
  return true;
}

void Scheduler::preempt(Backend& backend, Sequence& sequence) {
  deactivate(backend, sequence);
  sequence.state = SequenceState::preempted;
  sequence.waiting_since = now();
  ++sequence.statistics.preemptions;
  ++totals_.preemptions;
}

void Scheduler::deactivate(Backend& backend, Sequence& sequence) {
  const SequenceId id = std::exchange(sequence.id, -1);
  if (sequence.state == SequenceState::prefilling && sequence.family) {
    --sequence.family->num_prefilling;
  }
  --sequence.caller->num_active;
  cache_.unpin(std::exchange(sequence.chain, {}));
  sequence.drafted.reset();
  backend.release_sequence(id);
}

// Puts full pages into the prefix cache whose bits other texts would have as well.
void Scheduler::publish_pages(Backend& backend, Sequence& sequence) {
  if (!uses_cache(sequence)) return;
  // What was decoded may have other bits than what is prefilled.
  const std::int64_t positions =
      info().decodes_as_prefills ? sequence.length
                                 : std::min(sequence.length, std::ssize(sequence.request.prompt));
  const std::int64_t pages = positions / kKvPagePositions;
  while (std::ssize(sequence.chain) < pages) {
    const std::int64_t page = std::ssize(sequence.chain);
    std::vector<TokenId> tokens;
    for (std::int64_t i = 0; i < kKvPagePositions; ++i) {
      tokens.push_back(sequence.token_at(page * kKvPagePositions + i));
    }
    // Where another sequence has put the same page there, this one keeps its own.
    if (cache_.extend(sequence.chain, tokens)) continue;
    cache_.add(sequence.chain, tokens, backend.hold_page(sequence.id, page));
  }
}

}  // namespace clusterfusion
