// Prompts on a GPU, and decode steps of models that no decode kernel takes: as prompts of one
// token.
#include <algorithm>
#include <vector>

#include "backend/cuda/cuda_backend_impl.hpp"

namespace clusterfusion::cuda {

void CudaBackend::prefill(SequenceId id, std::span<const TokenId> tokens,
                          const PrefillOutput& output) {
  Sequence& sequence = find(id);
  sequences_.check.prefill(id, sequence, tokens, output);
  grow(sequence, sequence.length + std::ssize(tokens));
  prefill_in_pieces(sequence, tokens, prefill_.max_tokens(), output, config_.hidden_size,
                    [&](std::span<const TokenId> piece, const PrefillOutput& its_output) {
                      const PrefillPart part{id, piece, its_output};
                      prefill_pass({&part, 1});
                    });
}

void CudaBackend::prefill_together(std::span<const PrefillPart> parts) {
  sequences_.check.prefill_together(parts);
  std::vector<std::int64_t> lengths;
  for (const PrefillPart& part : parts) {
    Sequence& sequence = find(part.sequence);
    sequences_.check.prefill(part.sequence, sequence, part.tokens, part.output);
    lengths.push_back(sequence.length);
  }
  for (const PrefillPart& part : parts) {
    Sequence& sequence = find(part.sequence);
    grow(sequence, sequence.length + std::ssize(part.tokens));
  }
  try {
    prefill_passes(parts);
  } catch (...) {
    for (std::size_t i = 0; i < parts.size(); ++i) find(parts[i].sequence).truncate(lengths[i]);
    throw;
  }
}

std::size_t CudaBackend::parts_of_pass(std::span<const PrefillPart> parts) {
  const auto comes_alone = [&](const PrefillPart& part) {
    return find(part.sequence).interventions != nullptr || !part.output.activations.empty();
  };
  std::size_t count = 0;
  PromptNeed need;
  for (const PrefillPart& part : parts) {
    if (count > 0 && comes_alone(part)) break;
    need.add(piece_of(part, part.output));
    if (!prefill_.fits(need)) break;
    ++count;
    if (comes_alone(part)) break;
  }
  return count;
}

PromptPiece CudaBackend::piece_of(const PrefillPart& part, const PrefillOutput& output) {
  const Sequence& sequence = find(part.sequence);
  return {part.tokens, sequence.length, sequence.pages, sequence.interventions.get(), &output};
}

void CudaBackend::prefill_passes(std::span<const PrefillPart> parts) {
  for (std::size_t begin = 0; begin < parts.size();) {
    const std::size_t count = parts_of_pass(parts.subspan(begin));
    prefill_pass(parts.subspan(begin, count));
    begin += count;
  }
}

void CudaBackend::prefill_pass(std::span<const PrefillPart> parts) {
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  std::size_t choosing = 0;
  for (const PrefillPart& part : parts)
    choosing += part.output.sampled != nullptr && part.output.last_logits.empty();
  if (host_logits_.size() < choosing * vocab) host_logits_.resize(choosing * vocab);
  std::vector<PrefillOutput> outputs;
  std::vector<PromptPiece> pieces;
  outputs.reserve(parts.size());
  std::span<float> room = host_logits_;
  for (const PrefillPart& part : parts) {
    PrefillOutput& output = outputs.emplace_back(part.output);
    if (output.sampled != nullptr && output.last_logits.empty()) {
      output.last_logits = room.first(vocab);
      room = room.subspan(vocab);
    }
    pieces.push_back(piece_of(part, output));
  }
  prefill_.run(pieces, stream_);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    Sequence& sequence = find(parts[i].sequence);
    sequence.append(parts[i].tokens);
    if (outputs[i].sampled != nullptr)
      *outputs[i].sampled = sequence.sampler.sample(outputs[i].last_logits);
  }
}

void CudaBackend::decode_by_layers(std::span<const SequenceId> sequences,
                                   std::span<const TokenId> inputs, std::int32_t steps,
                                   std::span<SampledToken> sampled, std::span<float> logits) {
  const std::size_t batch = sequences.size();
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  if (host_logits_.size() < batch * vocab) host_logits_.resize(batch * vocab);
  const auto logits_of = [&](std::size_t b) {
    return std::span(host_logits_).subspan(b * vocab, vocab);
  };
  std::vector<TokenId> current(inputs.begin(), inputs.end());
  std::vector<PrefillPart> parts;
  std::vector<std::int64_t> lengths;
  for (std::size_t b = 0; b < batch; ++b) {
    PrefillOutput output;
    output.last_logits = logits_of(b);
    parts.push_back({sequences[b], std::span(&current[b], 1), output});
    lengths.push_back(find(sequences[b]).length);
  }
  try {
    for (std::int32_t step = 0; step < steps; ++step) {
      prefill_passes(parts);
      for (std::size_t b = 0; !sampled.empty() && b < batch; ++b) {
        SampledToken& token = sampled[step * batch + b];
        token = find(sequences[b]).sampler.sample(logits_of(b));
        current[b] = token.token;
      }
    }
    if (!logits.empty()) std::copy_n(host_logits_.begin(), batch * vocab, logits.begin());
  } catch (...) {
    for (std::size_t b = 0; b < batch; ++b) find(sequences[b]).truncate(lengths[b]);
    throw;
  }
}

}  // namespace clusterfusion::cuda
