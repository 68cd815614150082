// Decode steps of many sequences at once.
#include <algorithm>
#include <utility>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/cuda_backend_impl.hpp"
#include "sampling/sampler.hpp"

namespace clusterfusion::cuda {

void CudaBackend::prepare_rows() {
  if (streams()) {
    if (mode_ != DecodeMode::throughput || !StreamDecoder::supports(config_, plan_.kv, properties_))
      return;
    stream_decoder_.emplace(config_, plan_.kv, weights_, properties_, max_positions_,
                            kStepsOfLaunch);
  }
  if (plan_.kv.dtype == config_.dtype && GemmDecoder::supports(config_, properties_))
    gemm_decoder_.emplace(config_, plan_.kv, weights_, properties_.multiProcessorCount,
                          max_positions_, kStepsOfLaunch);
}

RowDecoder& CudaBackend::decoder_of(std::size_t rows) {
  if (!gemm_decoder_) return *stream_decoder_;
  // As long as one launch takes all rows, it is as quick as a series of kernels, or quicker.
  const bool streams = stream_decoder_ && std::cmp_less_equal(rows, stream_decoder_->max_rows());
  if (streams) return *stream_decoder_;
  return *gemm_decoder_;
}

DecodeRow CudaBackend::row_of(const Sequence& sequence, TokenId input, bool chooses) const {
  return {.position = sequence.length,
          .input = input,
          .temperature = chooses ? sequence.sampling.temperature : 0.0f,
          .seed = sequence.sampling.seed,
          .drawable_vocab_size = drawable_vocab_size(sequence.sampling),
          .pages = sequence.pages};
}

std::vector<std::vector<std::size_t>> CudaBackend::alike_groups(
    std::span<const SequenceId> sequences, std::span<const std::size_t> rows) {
  std::vector<std::vector<std::size_t>> groups;
  for (const std::size_t row : rows) {
    const auto& own = find(sequences[row]).interventions;
    const auto same = std::ranges::find_if(groups, [&](const auto& group) {
      return find(sequences[group.front()]).interventions == own;
    });
    if (same == groups.end())
      groups.push_back({row});
    else
      same->push_back(row);
  }
  return groups;
}

void CudaBackend::decode_row_by_steps(const DecodeCall& call) {
  const std::size_t batch = call.sequences.size();
  std::vector<TokenId> inputs(call.inputs.begin(), call.inputs.end());
  Sequence& sequence = find(call.sequence(0));
  std::int32_t alike = 0;
  for (std::int32_t done = 0; done < call.steps; done += alike) {
    alike = sequence.steps_alike(call.steps - done);
    DecodeCall part = call;
    part.inputs = inputs;
    part.steps = alike;
    if (!call.sampled.empty()) part.sampled = call.sampled.subspan(done * batch, alike * batch);
    decode_rows(part);
    if (!call.sampled.empty()) inputs[call.rows[0]] = part.room(alike - 1, 0)->token;
  }
}

void CudaBackend::decode_rows(const DecodeCall& call) {
  std::vector<DecodeRow> rows;
  std::vector<std::size_t> filtered;  // rows whose tokens the sampler chooses
  for (std::size_t row = 0; row < call.count(); ++row) {
    const Sequence& sequence = find(call.sequence(row));
    const bool filters = needs_sampler(sequence.sampling);
    if (filters) filtered.push_back(row);
    rows.push_back(row_of(sequence, call.input(row), !filters));
  }
  RowDecoder& decoder = decoder_of(rows.size());
  tell_interventions(decoder, find(call.sequence(0)));
  if (filtered.empty())
    decoder.enqueue(rows, call.steps, !call.logits.empty(), stream_);
  else
    enqueue_with_samplers(decoder, call, rows, filtered);
  take_chosen(decoder, call, filtered);
  fetch_row_logits(decoder, call);
}

void CudaBackend::tell_interventions(RowDecoder& decoder, const Sequence& sequence) {
  decoder.intervene(interventions_.at_step(sequence.interventions, sequence.length, stream_));
}

void CudaBackend::fetch_row_logits(const RowDecoder& decoder, const DecodeCall& call) {
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  for (std::size_t row = 0; row < call.count() && !call.logits.empty(); ++row)
    check(cudaMemcpy(call.logits.data() + call.rows[row] * vocab, decoder.logits(row),
                     vocab * sizeof(float), cudaMemcpyDeviceToHost),
          "fetching logits");
}

void CudaBackend::decode_row_with_host(const DecodeCall& call) {
  Sequence& sequence = find(call.sequence(0));
  RowDecoder& decoder = decoder_of(1);
  TokenId input = call.input(0);
  for (std::int32_t step = 0; step < call.steps; ++step) {
    const DecodeRow row = row_of(sequence, input, false);
    tell_interventions(decoder, sequence);
    decoder.enqueue(std::span(&row, 1), 1, true, stream_);
    std::int32_t chosen = 0;
    check(
        cudaMemcpyAsync(&chosen, decoder.chosen(), sizeof(chosen), cudaMemcpyDeviceToHost, stream_),
        "fetching tokens");
    check(cudaStreamSynchronize(stream_), "running the streaming kernel");
    require_finite(chosen, sequence.length);
    sequence.append(std::span(&input, 1));
    SampledToken* room = call.room(step, 0);
    if (room == nullptr) continue;
    check(cudaMemcpy(host_logits_.data(), decoder.logits(0), vocab_logits().size_bytes(),
                     cudaMemcpyDeviceToHost),
          "fetching logits");
    *room = sequence.sampler.sample(vocab_logits());
    input = room->token;
  }
  fetch_row_logits(decoder, call);
}

void CudaBackend::enqueue_with_samplers(RowDecoder& decoder, const DecodeCall& call,
                                        std::vector<DecodeRow> rows,
                                        std::span<const std::size_t> filtered) {
  while (row_samplers_.size() < filtered.size())
    row_samplers_.emplace_back(config_.vocab_size, kStepsOfLaunch);
  for (std::size_t i = 0; i < filtered.size(); ++i) {
    const Sequence& sequence = find(call.sequence(filtered[i]));
    const std::span<const TokenId> before = sequence.sampler.tokens();
    std::vector<TokenId> tokens(before.begin(), before.end());
    tokens.push_back(call.input(filtered[i]));
    row_samplers_[i].begin(sequence.sampling, tokens, sequence.length + 1, stream_);
  }
  std::vector<const TokenId*> inputs(call.count(), nullptr);
  for (std::int32_t step = 0; step < call.steps; ++step) {
    decoder.enqueue_step(rows, step, inputs, stream_);
    for (std::size_t row = 0; row < call.count(); ++row) {
      inputs[row] = decoder.chosen(step) + row;
      ++rows[row].position;
    }
    for (std::size_t i = 0; i < filtered.size(); ++i)
      inputs[filtered[i]] = row_samplers_[i].choose(decoder.logits(filtered[i]), stream_);
  }
  for (std::size_t i = 0; i < filtered.size(); ++i) row_samplers_[i].fetch(stream_);
}

void CudaBackend::take_chosen(const RowDecoder& decoder, const DecodeCall& call,
                              std::span<const std::size_t> filtered) {
  const bool in_series = !filtered.empty();
  const std::size_t stride = in_series ? decoder.max_rows() : call.count();
  std::vector<std::int32_t> chosen(call.steps * stride);
  check(cudaMemcpyAsync(chosen.data(), decoder.chosen(), chosen.size() * sizeof(std::int32_t),
                        cudaMemcpyDeviceToHost, stream_),
        "fetching tokens");
  check(cudaStreamSynchronize(stream_), "running the streaming kernel");
  for (std::int32_t step = 0; step < call.steps; ++step)
    for (std::size_t row = 0; row < call.count(); ++row)
      require_finite(chosen[step * stride + row], find(call.sequence(row)).length + step);
  std::size_t sampler = 0;
  for (std::size_t row = 0; row < call.count(); ++row) {
    const bool filters = sampler < filtered.size() && filtered[sampler] == row;
    Sequence& sequence = find(call.sequence(row));
    TokenId input = call.input(row);
    for (std::int32_t step = 0; step < call.steps; ++step) {
      sequence.append(std::span(&input, 1));
      SampledToken token{chosen[step * stride + row], 0.0f, {}};
      if (filters) token = row_samplers_[sampler].chosen(step);
      input = token.token;
      if (SampledToken* room = call.room(step, row)) *room = std::move(token);
    }
    sampler += filters;
  }
}

}  // namespace clusterfusion::cuda
