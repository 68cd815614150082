#include "backend/proposal.hpp"

#include "backend/backend.hpp"

namespace clusterfusion {
namespace {

// One step of the sequences that go on. False if there are none.
bool verify_step(Backend& backend, std::span<Proposal> batch) {
  std::vector<Proposal*> going;
  std::vector<SequenceId> ids;
  std::vector<TokenId> inputs;
  for (Proposal& proposal : batch) {
    if (!proposal.goes_on()) continue;
    going.push_back(&proposal);
    ids.push_back(proposal.sequence);
    inputs.push_back(proposal.tokens[proposal.chosen.size()]);
  }
  if (going.empty()) return false;
  std::vector<SampledToken> sampled(ids.size());
  backend.decode(ids, inputs, 1, sampled, {});
  for (std::size_t i = 0; i < going.size(); ++i) {
    going[i]->chosen.push_back(std::move(sampled[i]));
  }
  return true;
}

}  // namespace

bool concerns_one_sequence(ErrorKind kind) noexcept {
  return kind == ErrorKind::non_finite || kind == ErrorKind::invalid_argument;
}

void verify_by_steps(Backend& backend, std::span<Proposal> batch) {
  std::vector<std::int64_t> lengths;
  for (Proposal& proposal : batch) {
    proposal.chosen.clear();
    lengths.push_back(backend.length(proposal.sequence));
  }
  try {
    for (bool is_first = true;; is_first = false) {
      try {
        if (!verify_step(backend, batch)) return;
      } catch (const Error& error) {
        if (is_first || !concerns_one_sequence(error.kind())) throw;
        return;
      }
    }
  } catch (...) {
    for (std::size_t i = 0; i < batch.size(); ++i) {
      if (backend.length(batch[i].sequence) > lengths[i])
        backend.truncate(batch[i].sequence, lengths[i]);
    }
    throw;
  }
}

}  // namespace clusterfusion
