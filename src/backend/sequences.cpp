#include "backend/sequences.hpp"

#include <set>

namespace clusterfusion {

void SequenceChecks::unknown(SequenceId id) {
  fail(ErrorKind::invalid_argument,
       "there is no sequence {}: it was never created, or it has been released", id);
}

void SequenceChecks::token(TokenId token, std::size_t index, const char* what) const {
  require(token >= 0 && token < config_.vocab_size, ErrorKind::out_of_range,
          "{}[{}] is {}, but token ids of this model lie in [0, {})", what, index, token,
          config_.vocab_size);
}

void SequenceChecks::room(SequenceId id, const BackendSequence& sequence, std::size_t more) const {
  require(more <= static_cast<std::uint64_t>(info_.max_positions - sequence.length),
          ErrorKind::invalid_argument,
          "sequence {} holds {} positions and cannot take {} more: the longest context is {}", id,
          sequence.length, more, info_.max_positions);
}

void SequenceChecks::intervene(SequenceId id, const BackendSequence& sequence) {
  require(sequence.length == 0, ErrorKind::invalid_argument,
          "sequence {} has {} positions already: interventions begin with a sequence", id,
          sequence.length);
}

void SequenceChecks::pages(std::span<const TokenId> tokens, std::span<const KvPageId> pages) {
  require(std::ssize(pages) == kv_pages_of(std::ssize(tokens)), ErrorKind::invalid_argument,
          "{} tokens stand in {} pages, but {} were given", tokens.size(),
          kv_pages_of(std::ssize(tokens)), pages.size());
}

void SequenceChecks::reserve(SequenceId id, std::int64_t positions) const {
  require(positions >= 0 && positions <= info_.max_positions, ErrorKind::invalid_argument,
          "cannot reserve {} positions for sequence {}: the longest context is {}", positions, id,
          info_.max_positions);
}

void SequenceChecks::truncate(SequenceId id, const BackendSequence& sequence, std::int64_t length) {
  require(length >= 0 && length <= sequence.length, ErrorKind::invalid_argument,
          "cannot truncate sequence {} to {} positions: it has {}", id, length, sequence.length);
}

void SequenceChecks::prefill(SequenceId id, const BackendSequence& sequence,
                             std::span<const TokenId> tokens, const PrefillOutput& output) const {
  require(!tokens.empty(), ErrorKind::invalid_argument,
          "prefill of sequence {} needs at least one token", id);
  for (std::size_t i = 0; i < tokens.size(); ++i) token(tokens[i], i, "tokens");
  room(id, sequence, tokens.size());
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  require(output.all_logits.empty() || output.all_logits.size() == tokens.size() * vocab,
          ErrorKind::invalid_argument,
          "all_logits must have {} x {} elements (tokens x vocabulary), but has {}", tokens.size(),
          vocab, output.all_logits.size());
  require(output.last_logits.empty() || output.last_logits.size() == vocab,
          ErrorKind::invalid_argument, "last_logits must have {} elements, but has {}", vocab,
          output.last_logits.size());
  require(output.targets.size() == output.target_logprobs.size() &&
              (output.targets.empty() || output.targets.size() == tokens.size()),
          ErrorKind::invalid_argument,
          "targets and target_logprobs must both have {} elements or none, but have {} and {}",
          tokens.size(), output.targets.size(), output.target_logprobs.size());
  require(output.target_is_likeliest.empty() ||
              output.target_is_likeliest.size() == output.targets.size(),
          ErrorKind::invalid_argument,
          "target_is_likeliest must have as many elements as targets ({}) or none, but has {}",
          output.targets.size(), output.target_is_likeliest.size());
  for (std::size_t i = 0; i < output.targets.size(); ++i) {
    if (output.targets[i] != -1) token(output.targets[i], i, "targets");
  }
}

void SequenceChecks::decode(std::span<const SequenceId> ids, std::span<const TokenId> inputs,
                            std::int32_t steps, std::size_t sampled, std::size_t logits) const {
  const std::size_t batch = ids.size();
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  require(batch > 0 && inputs.size() == batch, ErrorKind::invalid_argument,
          "decode needs at least one sequence and one input for each, but got {} sequences and {} "
          "inputs",
          batch, inputs.size());
  require(steps >= 1 && steps <= info_.decode_ahead, ErrorKind::invalid_argument,
          "steps must lie in [1, {}] on this device, but is {}", info_.decode_ahead, steps);
  const std::size_t tokens = batch * static_cast<std::size_t>(steps);
  require(sampled == tokens || (sampled == 0 && steps == 1), ErrorKind::invalid_argument,
          "sampled must have {} x {} elements (steps x batch){}, but has {}", steps, batch,
          steps == 1 ? " or none" : "", sampled);
  require(logits == 0 || logits == batch * vocab, ErrorKind::invalid_argument,
          "logits must have {} x {} elements (batch x vocabulary) or none, but has {}", batch,
          vocab, logits);
  std::set<SequenceId> seen;
  for (std::size_t b = 0; b < batch; ++b) {
    require(seen.insert(ids[b]).second, ErrorKind::invalid_argument,
            "sequences[{}] is {}, which is in this batch already", b, ids[b]);
    token(inputs[b], b, "inputs");
  }
}

void SequenceChecks::prefill_together(std::span<const PrefillPart> parts) const {
  std::set<SequenceId> seen;
  std::int64_t total = 0;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    require(seen.insert(parts[i].sequence).second, ErrorKind::invalid_argument,
            "parts[{}] is of sequence {}, which is in this batch already", i, parts[i].sequence);
    total += std::ssize(parts[i].tokens);
  }
  require(total <= info_.prefill_chunk, ErrorKind::invalid_argument,
          "{} pieces of prompts have {} tokens in all, and one pass takes at most {}", parts.size(),
          total, info_.prefill_chunk);
}

void Backend::prefill_together(std::span<const PrefillPart> parts) {
  std::vector<std::int64_t> lengths;
  for (const PrefillPart& part : parts) lengths.push_back(length(part.sequence));
  try {
    for (const PrefillPart& part : parts) prefill(part.sequence, part.tokens, part.output);
  } catch (...) {
    for (std::size_t i = 0; i < parts.size(); ++i) {
      if (length(parts[i].sequence) > lengths[i]) truncate(parts[i].sequence, lengths[i]);
    }
    throw;
  }
}

void SequenceChecks::verify(std::span<const Proposal> batch) const {
  require(!batch.empty(), ErrorKind::invalid_argument, "verify needs at least one sequence");
  std::set<SequenceId> seen;
  for (std::size_t b = 0; b < batch.size(); ++b) {
    const std::vector<TokenId>& tokens = batch[b].tokens;
    require(seen.insert(batch[b].sequence).second, ErrorKind::invalid_argument,
            "batch[{}] is of sequence {}, which is in this batch already", b, batch[b].sequence);
    require(!tokens.empty() && (info_.verify_rows == 1 || std::ssize(tokens) <= info_.verify_rows),
            ErrorKind::invalid_argument, "batch[{}] must have 1 to {} tokens, but has {}", b,
            info_.verify_rows, tokens.size());
    for (std::size_t i = 0; i < tokens.size(); ++i) token(tokens[i], i, "proposed tokens");
  }
}

PrefillOutput output_of_piece(const PrefillOutput& output, std::int64_t hidden_size,
                              std::size_t total, std::size_t begin, std::size_t count) {
  PrefillOutput piece;
  if (!output.all_logits.empty()) {
    const std::size_t vocab = output.all_logits.size() / total;
    piece.all_logits = output.all_logits.subspan(begin * vocab, count * vocab);
  }
  if (!output.targets.empty()) {
    piece.targets = output.targets.subspan(begin, count);
    piece.target_logprobs = output.target_logprobs.subspan(begin, count);
    if (!output.target_is_likeliest.empty())
      piece.target_is_likeliest = output.target_is_likeliest.subspan(begin, count);
  }
  piece.activations = rows_from(static_cast<std::int64_t>(begin), hidden_size, output.activations);
  if (begin + count < total) return piece;
  piece.last_logits = output.last_logits;
  piece.sampled = output.sampled;
  return piece;
}

std::int64_t kv_pages_in(std::int64_t bytes, std::int64_t page_bytes) {
  require(bytes >= page_bytes, ErrorKind::invalid_argument,
          "kv_bytes is {}, and a page of the KV cache, {} positions, takes {}; give at least that, "
          "or 0 for most of the memory that is left",
          bytes, kKvPagePositions, page_bytes);
  return bytes / page_bytes;
}

std::int64_t longest_context(const ModelConfig& config, std::int64_t wanted) {
  require(wanted >= 0 && wanted <= config.max_positions, ErrorKind::invalid_argument,
          "max_positions must be 0 (the model's {}) to {}, but is {}", config.max_positions,
          config.max_positions, wanted);
  return wanted == 0 ? config.max_positions : wanted;
}

}  // namespace clusterfusion
