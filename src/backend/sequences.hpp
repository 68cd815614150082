// The sequences of a backend, and what its contract (backend.hpp) demands of every call: the same
// checks with the same words on every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "backend/backend.hpp"
#include "base/fail.hpp"
#include "sampling/sampler.hpp"

namespace clusterfusion {

// What a sequence has on every device.
struct BackendSequence {
  BackendSequence(const SamplingParams& params, std::int64_t vocab_size)
      : sampling(params), sampler(params, vocab_size) {}

  // `tokens` are computed and stored.
  void append(std::span<const TokenId> tokens) {
    sampler.append(tokens);
    length += std::ssize(tokens);
  }
  void truncate(std::int64_t new_length) {
    sampler.truncate(new_length);
    length = new_length;
  }

  SamplingParams sampling;
  Sampler sampler;
  std::int64_t length = 0;
};

// `Page` is a pointer to a page of the device's KV pool.
template <typename Page>
struct PagedSequence : BackendSequence {
  using BackendSequence::BackendSequence;
  std::vector<Page> pages;
};

// Errors of all checks: invalid_argument, out_of_range for tokens, with the numbers.
class SequenceChecks {
 public:
  // Both are looked at when a check is made, and outlive this.
  SequenceChecks(const ModelConfig& config, const BackendInfo& info)
      : config_(config), info_(info) {}

  // Of a sequence that begins with tokens whose keys and values there are.
  static void pages(std::span<const TokenId> tokens, std::span<const KvPageId> pages);
  // Before its first token.
  static void intervene(SequenceId id, const BackendSequence& sequence);
  void reserve(SequenceId id, std::int64_t positions) const;
  static void truncate(SequenceId id, const BackendSequence& sequence, std::int64_t length);
  void prefill(SequenceId id, const BackendSequence& sequence, std::span<const TokenId> tokens,
               const PrefillOutput& output) const;
  // Of all of a batch, but for what differs between its parts.
  void prefill_together(std::span<const PrefillPart> parts) const;
  // Of all of a batch, but for what differs between its members.
  void decode(std::span<const SequenceId> ids, std::span<const TokenId> inputs, std::int32_t steps,
              std::size_t sampled, std::size_t logits) const;
  // Of proposals, but for their room.
  void verify(std::span<const Proposal> batch) const;
  void room(SequenceId id, const BackendSequence& sequence, std::size_t more) const;
  [[noreturn]] static void unknown(SequenceId id);

 private:
  void token(TokenId token, std::size_t index, const char* what) const;

  const ModelConfig& config_;
  const BackendInfo& info_;
};

// `Sequence` is a PagedSequence, or has one as its base.
template <typename Sequence>
class Sequences {
 public:
  Sequences(const ModelConfig& config, const BackendInfo& info)
      : check(config, info), vocab_size_(config.vocab_size) {}

  SequenceId create(const SamplingParams& sampling) {
    sequences_.try_emplace(next_id_, sampling, vocab_size_);
    return next_id_++;
  }
  void erase(SequenceId id) { sequences_.erase(id); }

  Sequence& find(SequenceId id) {
    const auto found = sequences_.find(id);
    if (found == sequences_.end()) SequenceChecks::unknown(id);
    return found->second;
  }
  const Sequence& find(SequenceId id) const { return const_cast<Sequences*>(this)->find(id); }

  // Those of a batch, in its order, checked for a decode().
  std::vector<Sequence*> find_batch(std::span<const SequenceId> ids,
                                    std::span<const TokenId> inputs, std::int32_t steps,
                                    std::size_t sampled, std::size_t logits) {
    check.decode(ids, inputs, steps, sampled, logits);
    std::vector<Sequence*> batch;
    for (const SequenceId id : ids) {
      batch.push_back(&find(id));
      check.room(id, *batch.back(), static_cast<std::size_t>(steps));
    }
    return batch;
  }

  // The same for a verify(), whose proposals begin without choices.
  std::vector<Sequence*> find_batch(std::span<Proposal> batch) {
    check.verify(batch);
    std::vector<Sequence*> sequences;
    for (Proposal& proposal : batch) {
      sequences.push_back(&find(proposal.sequence));
      check.room(proposal.sequence, *sequences.back(), proposal.tokens.size());
      proposal.chosen.clear();
    }
    return sequences;
  }

  const SequenceChecks check;

 private:
  std::int64_t vocab_size_;
  std::map<SequenceId, Sequence> sequences_;
  SequenceId next_id_ = 0;
};

// Goes on with a proposal as long as it is what the sequence chooses: choose(i) gives the choice
// behind tokens[i], which is appended by then. On return the sequence has the tokens of the run.
// Errors: those of choose() for the first token, with the sequence as it was; later ones end the
// run.
template <typename Choose>
void choose_run(BackendSequence& sequence, Proposal& proposal, const Choose& choose) {
  while (proposal.goes_on()) {
    const std::size_t i = proposal.chosen.size();
    const std::int64_t length = sequence.length;
    sequence.append(std::span(proposal.tokens).subspan(i, 1));
    try {
      proposal.chosen.push_back(choose(i));
    } catch (const Error& error) {
      sequence.truncate(length);
      if (i == 0 || !concerns_one_sequence(error.kind())) throw;
      return;
    }
  }
}

// Pieces of a batch, in its order, with at most `most` rows each: calls run(first, last).
template <typename Run>
void for_each_rows(std::span<const Proposal> batch, std::size_t most, const Run& run) {
  std::size_t first = 0, rows = 0;
  for (std::size_t i = 0; i < batch.size(); ++i) {
    if (rows + batch[i].tokens.size() > most) {
      run(first, i);
      first = i;
      rows = 0;
    }
    rows += batch[i].tokens.size();
  }
  run(first, batch.size());
}

// What tokens [begin, begin + count) of a prompt of `total` are to give: the last ones bring what
// is asked for at the end.
PrefillOutput output_of_piece(const PrefillOutput& output, std::int64_t hidden_size,
                              std::size_t total, std::size_t begin, std::size_t count);

// Calls append(tokens, output) for each piece of at most `most` tokens of a checked prompt; what is
// thrown leaves the sequence as it was. `hidden_size` is the model's.
template <typename Append>
void prefill_in_pieces(BackendSequence& sequence, std::span<const TokenId> tokens,
                       std::int64_t most, const PrefillOutput& output, std::int64_t hidden_size,
                       const Append& append) {
  const std::int64_t old_length = sequence.length;
  try {
    for (std::size_t begin = 0; begin < tokens.size();) {
      const std::size_t count = std::min(tokens.size() - begin, static_cast<std::size_t>(most));
      append(tokens.subspan(begin, count),
             output_of_piece(output, hidden_size, tokens.size(), begin, count));
      begin += count;
    }
  } catch (...) {
    sequence.truncate(old_length);
    throw;
  }
}

// Whole pages in the KV cache's bytes. Errors: invalid_argument if there is none.
std::int64_t kv_pages_in(std::int64_t bytes, std::int64_t page_bytes);

// The longest context of a sequence, from BackendOptions::max_positions. Errors: invalid_argument.
std::int64_t longest_context(const ModelConfig& config, std::int64_t wanted);

}  // namespace clusterfusion
