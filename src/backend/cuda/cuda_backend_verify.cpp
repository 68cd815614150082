// Steps that verify proposals: several tokens of a sequence at once.
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/cuda_backend_impl.hpp"
#include "sampling/adjustments.hpp"
#include "sampling/sampler.hpp"

namespace clusterfusion::cuda {

void CudaBackend::verify(std::span<Proposal> batch) {
  if (!decodes_rows()) return verify_by_steps(*this, batch);
  std::vector<SequenceId> ids;
  std::vector<std::int64_t> lengths;
  for (Sequence* sequence : sequences_.find_batch(batch)) lengths.push_back(sequence->length);
  for (std::size_t b = 0; b < batch.size(); ++b) {
    ids.push_back(batch[b].sequence);
    grow(find(ids[b]), lengths[b] + std::ssize(batch[b].tokens));
  }
  try {
    verify_groups(batch, ids);
  } catch (...) {
    for (std::size_t b = 0; b < batch.size(); ++b) find(ids[b]).truncate(lengths[b]);
    throw;
  }
}

void CudaBackend::verify_groups(std::span<Proposal> batch, std::span<const SequenceId> ids) {
  std::vector<std::size_t> together;
  for (std::size_t b = 0; b < batch.size(); ++b) {
    // Rows that are steered each as its position is have no step in common.
    if (find(ids[b]).steps_alike(2) == 1)
      verify_by_steps(*this, batch.subspan(b, 1));
    else
      together.push_back(b);
  }
  for (const std::vector<std::size_t>& group : alike_groups(ids, together)) {
    std::vector<Proposal*> proposals;
    std::size_t rows = 0;
    for (const std::size_t b : group) {
      const std::size_t more = batch[b].tokens.size();
      if (rows + more > max_rows()) {
        verify_rows(proposals);
        proposals.clear();
        rows = 0;
      }
      proposals.push_back(&batch[b]);
      rows += more;
    }
    verify_rows(proposals);
  }
}

void CudaBackend::verify_rows(std::span<Proposal* const> proposals) {
  std::vector<DecodeRow> rows;
  std::vector<VerifiedRows> verified;
  std::size_t samplers = 0;
  bool with_logits = false;
  for (const Proposal* proposal : proposals) {
    const Sequence& sequence = find(proposal->sequence);
    VerifiedRows own{rows.size(), std::nullopt, needs_host(sequence.sampling)};
    if (!own.on_host && needs_sampler(sequence.sampling)) own.first_sampler = samplers;
    if (own.first_sampler) samplers += proposal->tokens.size();
    const bool by_logits = own.on_host || own.first_sampler;
    with_logits |= by_logits;
    for (const TokenId token : proposal->tokens) {
      rows.push_back(row_of(sequence, token, !by_logits));
      rows.back().position += std::ssize(rows) - 1 - static_cast<std::int64_t>(own.first_row);
    }
    verified.push_back(own);
  }
  RowDecoder& decoder = decoder_of(rows.size());
  tell_interventions(decoder, find(proposals.front()->sequence));
  decoder.enqueue(rows, 1, with_logits, stream_);
  for (std::size_t i = 0; i < proposals.size(); ++i) {
    if (verified[i].first_sampler) enqueue_samplers(decoder, *proposals[i], verified[i]);
  }
  std::vector<std::int32_t> chosen(rows.size());
  check(cudaMemcpyAsync(chosen.data(), decoder.chosen(), chosen.size() * sizeof(std::int32_t),
                        cudaMemcpyDeviceToHost, stream_),
        "fetching tokens");
  check(cudaStreamSynchronize(stream_), "running the streaming kernel");
  for (std::size_t i = 0; i < proposals.size(); ++i)
    choose_verified(decoder, *proposals[i], verified[i], chosen);
}

void CudaBackend::enqueue_samplers(RowDecoder& decoder, const Proposal& proposal,
                                   const VerifiedRows& rows) {
  const Sequence& sequence = find(proposal.sequence);
  while (row_samplers_.size() < *rows.first_sampler + proposal.tokens.size())
    row_samplers_.emplace_back(config_.vocab_size, kStepsOfLaunch);
  const std::span<const TokenId> before = sequence.sampler.tokens();
  std::vector<TokenId> tokens(before.begin(), before.end());
  for (std::size_t i = 0; i < proposal.tokens.size(); ++i) {
    tokens.push_back(proposal.tokens[i]);
    DeviceSampler& sampler = row_samplers_[*rows.first_sampler + i];
    sampler.begin(sequence.sampling, tokens, sequence.length + 1 + static_cast<std::int64_t>(i),
                  stream_);
    sampler.choose(decoder.logits(rows.first_row + i), stream_);
    sampler.fetch(stream_);
  }
}

void CudaBackend::choose_verified(const RowDecoder& decoder, Proposal& proposal,
                                  const VerifiedRows& rows, std::span<const std::int32_t> chosen) {
  Sequence& sequence = find(proposal.sequence);
  choose_run(sequence, proposal, [&](std::size_t i) {
    const std::size_t row = rows.first_row + i;
    require_finite(chosen[row], sequence.length - 1);
    if (rows.first_sampler) return row_samplers_[*rows.first_sampler + i].chosen(0);
    if (!rows.on_host) return SampledToken{chosen[row], 0.0f, {}};
    check(cudaMemcpy(host_logits_.data(), decoder.logits(row), vocab_logits().size_bytes(),
                     cudaMemcpyDeviceToHost),
          "fetching logits");
    return sequence.sampler.sample(vocab_logits());
  });
}

}  // namespace clusterfusion::cuda
