// Steps that verify what a draft proposes.
#include <algorithm>
#include <utility>

#include "engine/scheduler.hpp"
#include "engine/speculation.hpp"

namespace clusterfusion {
namespace {

void note_proposals(Statistics& statistics, std::int64_t proposed, std::int64_t accepted) {
  if (proposed == 0) return;
  ++statistics.draft_steps;
  statistics.draft_proposed += proposed;
  statistics.draft_accepted += accepted;
}

}  // namespace

void Scheduler::prepare_speculation(std::unique_ptr<Draft> draft) {
  if (draft == nullptr || info().verify_rows < 2) return;
  speculation_ = std::make_unique<Speculation>(
      std::move(draft), SpeculationOptions{.most_tokens = options_.draft_tokens,
                                           .adapts = options_.draft_adapts,
                                           .vocab_size = backend_->model().config().vocab_size,
                                           .verify_rows = info().verify_rows,
                                           .now = options_.now});
  if (!options_.draft_adapts) return;
  backend_->run_unasked([this](Backend& backend) { speculation_->measure(backend); });
}

// One step of the members, if the draft has anything to propose for them. False if not: then they
// are to make plain steps.
bool Scheduler::decode_proposals(Backend& backend, const Members& members) {
  if (!speculation_) return false;
  const double start = now();
  std::vector<DraftCandidate> candidates;
  for (Sequence* member : members) candidates.push_back(candidate_of(*member));
  if (!speculation_->propose(candidates)) {
    note_decode(members, now() - start, 0, 0);
    return false;
  }
  drop_what_has_no_room(backend, members, candidates);
  Members able;
  std::vector<DraftCandidate> theirs;
  for (std::size_t i = 0; i < members.size(); ++i) {  // the oldest first
    const std::int64_t more = 1 + std::ssize(candidates[i].proposals);
    if (members[i]->is_active()) grow(backend, *members[i], members[i]->length + more);
  }
  for (std::size_t i = 0; i < members.size(); ++i) {
    if (!members[i]->is_active()) continue;
    able.push_back(members[i]);
    theirs.push_back(std::move(candidates[i]));
  }
  if (!able.empty()) verify(backend, able, theirs, start);
  return true;
}

// What it decodes again is known.
DraftCandidate Scheduler::candidate_of(Sequence& sequence) {
  if (sequence.is_computed_again()) return {};
  const PreparedRequest& request = sequence.request;
  if (!sequence.drafted) {
    sequence.drafted = speculation_->begin(request.sampling);
    sequence.drafted->draft->append(request.prompt);
  }
  DraftedText& text = *sequence.drafted;
  text.draft->append(std::span(sequence.tokens).subspan(text.num_told));
  text.num_told = sequence.tokens.size();
  const std::int64_t come = std::ssize(sequence.tokens);
  // The step has a token of its own.
  const auto room = std::min<std::int64_t>(request.max_new_tokens - come - 1, info().verify_rows);
  return {.text = &text,
          .most = static_cast<std::int32_t>(room),
          .new_tokens = come,
          .max_new_tokens = request.max_new_tokens};
}

// Nobody loses memory to proposals.
void Scheduler::drop_what_has_no_room(Backend& backend, const Members& members,
                                      std::span<DraftCandidate> candidates) const {
  std::int64_t room = free_pages(backend) + cache_.num_evictable();
  for (std::size_t i = 0; i < members.size(); ++i) {
    const Sequence& member = *members[i];
    const auto pages = [&](std::int64_t more) {
      return kv_pages_of(member.length + more) - member.num_pages +
             (member.shares_last_page ? 1 : 0);
    };
    const std::int64_t wanted = pages(1 + std::ssize(candidates[i].proposals));
    if (wanted > std::max<std::int64_t>(pages(1), 0) && wanted > room) {
      candidates[i].proposals.clear();
    }
    room -= std::max<std::int64_t>(pages(1 + std::ssize(candidates[i].proposals)), 0);
  }
}

// `start`: when the draft was asked.
void Scheduler::verify(Backend& backend, const Members& members,
                       std::span<const DraftCandidate> candidates, double start) {
  step_members_ = members;
  std::vector<Proposal> batch;
  for (std::size_t i = 0; i < members.size(); ++i) {
    batch.push_back({members[i]->id, {members[i]->tokens[members[i]->num_computed - 1]}});
    batch.back().tokens.insert(batch.back().tokens.end(), candidates[i].proposals.begin(),
                               candidates[i].proposals.end());
  }
  const double step_start = now();
  try {
    backend.verify(batch);
  } catch (const Error& error) {
    return decode_apart(backend, members, error);
  }
  const double end = now();
  clock_.note_burst(end - start, 1);
  note_decode(members, end - start, verified_bytes(members, batch), 1);
  std::vector<std::int32_t> accepted;
  for (std::size_t i = 0; i < members.size(); ++i) {
    accepted.push_back(static_cast<std::int32_t>(batch[i].chosen.size()) - 1);
    note_proposals(members[i]->statistics, std::ssize(candidates[i].proposals), accepted.back());
  }
  speculation_->note_step(candidates, accepted, end - step_start);
  for (std::size_t i = 0; i < members.size(); ++i) {
    for (SampledToken& token : batch[i].chosen) {
      if (!members[i]->is_active()) break;
      ++members[i]->length;
      accept(backend, *members[i], std::move(token));
    }
  }
  for (Sequence* member : members) {
    if (member->is_active()) publish_pages(backend, *member);
  }
}

// The weights are read once, and keys and values as far as the last row's.
double Scheduler::verified_bytes(const Members& members, std::span<const Proposal> batch) const {
  std::int64_t rows = 0;
  for (const Proposal& proposal : batch) rows += std::ssize(proposal.tokens) - 1;
  return step_bytes(members, 0) +
         static_cast<double>(rows) * static_cast<double>(info().kv_bytes_per_position);
}

}  // namespace clusterfusion
