// Decode steps of one sequence after the other, by the streaming kernel for one row.
#include <algorithm>
#include <utility>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/cuda_backend_impl.hpp"
#include "backend/cuda/decode/decode_kernel.hpp"
#include "sampling/adjustments.hpp"
#include "sampling/sampler.hpp"

namespace clusterfusion::cuda {

void CudaBackend::allocate_scratch() {
  const std::int64_t phases = num_phases(config_.num_layers, config_.parallel_residual);
  counters_ = DeviceMemory((kStepsOfLaunch * phases + 1) * 4, "counters");
  params_.tickets = counters_.as<std::uint32_t>();
  params_.arrivals = params_.tickets + kStepsOfLaunch * phases;
  lamport_ = DeviceMemory(std::int64_t{kLamportSets} * params_.layout.bytes, "Lamport buffers");
  params_.lamport = lamport_.as<>();
  logits_ = DeviceMemory(kStepsOfLaunch * config_.vocab_size * 4, "logits");
  tokens_ = DeviceMemory(kStepsOfLaunch * 4 * 2, "tokens");
  const std::int64_t pages = info_.max_positions / kKvPagePositions + 1;
  page_table_ = DeviceMemory(pages * sizeof(char*), "the page table");
  params_.kv_pages = page_table_.as<char*>();
  params_.given_tokens = tokens_.as<std::int32_t>();
  params_.given_count = 1;
  params_.chosen = tokens_.as<std::int32_t>() + kStepsOfLaunch;
  host_chosen_.resize(kStepsOfLaunch);
}

void CudaBackend::run(Sequence& sequence, TokenId input, std::int64_t steps,
                      std::int64_t first_scored, bool want_logits, float temperature) {
  send(sequence, input);
  params_.first_position = static_cast<std::int32_t>(sequence.length);
  params_.steps = static_cast<std::int32_t>(steps);
  params_.first_scored_step = static_cast<std::int32_t>(first_scored);
  params_.logits = want_logits ? logits_.as<float>() : nullptr;
  params_.temperature = temperature;
  params_.seed = sequence.sampling.seed;
  params_.drawable_vocab_size = drawable_vocab_size(sequence.sampling);
  interventions_.at_step(sequence.interventions, sequence.length, stream_).tell(params_);
  launch(params_);
  wait(sequence.length, steps, first_scored);
  sequence.append(std::span(&input, 1));
  // Inputs that the device chose for itself.
  sequence.append(std::span<const TokenId>(host_chosen_).first(steps - 1));
}

void CudaBackend::send(const Sequence& sequence, const TokenId& input) {
  check(cudaMemcpyAsync(tokens_.as<>(), &input, sizeof(input), cudaMemcpyHostToDevice, stream_),
        "sending a token");
  check(cudaMemcpyAsync(page_table_.as<>(), sequence.pages.data(),
                        sequence.pages.size() * sizeof(char*), cudaMemcpyHostToDevice, stream_),
        "sending the page table");
}

void CudaBackend::launch(const DecodeParams& params) {
  check(cudaMemsetAsync(counters_.as<>(), 0, counters_.bytes(), stream_), "clearing counters");
  check(cudaMemsetAsync(lamport_.as<>(), 0xff, lamport_.bytes(), stream_),
        "clearing Lamport buffers");
  launch_decode(kernel_, params, properties_.multiProcessorCount, plan_.shared_bytes, stream_);
}

void CudaBackend::wait(std::int64_t first_position, std::int64_t steps, std::int64_t first_scored) {
  check(cudaMemcpyAsync(host_chosen_.data(), params_.chosen, steps * 4, cudaMemcpyDeviceToHost,
                        stream_),
        "fetching tokens");
  check(cudaStreamSynchronize(stream_), "running the decode kernel");
  for (std::int64_t step = first_scored; step < steps; ++step)
    require_finite(host_chosen_[step], first_position + step);
}

void CudaBackend::copy_logits(std::int64_t row, std::span<float> to) {
  check(cudaMemcpy(to.data(), logits_.as<float>() + row * static_cast<std::int64_t>(to.size()),
                   to.size_bytes(), cudaMemcpyDeviceToHost),
        "fetching logits");
}

void CudaBackend::decode_one_by_one(std::span<const SequenceId> sequences,
                                    std::span<const TokenId> inputs, std::int32_t steps,
                                    std::span<SampledToken> sampled, std::span<float> logits) {
  const std::size_t batch = sequences.size();
  const std::int64_t vocab = config_.vocab_size;
  for (std::size_t b = 0; b < batch; ++b) {
    Sequence& sequence = find(sequences[b]);
    const std::span<float> wanted = logits.empty() ? logits : logits.subspan(b * vocab, vocab);
    if (needs_host(sequence.sampling))
      decode_with_host(sequence, inputs[b], steps, sampled, b, batch, wanted);
    else if (needs_sampler(sequence.sampling))
      decode_with_sampler(sequence, inputs[b], steps, sampled, b, batch, wanted);
    else
      decode_in_one_launch(sequence, inputs[b], steps, sampled, b, batch, wanted);
  }
}

void CudaBackend::decode_in_one_launch(Sequence& sequence, TokenId input, std::int32_t steps,
                                       std::span<SampledToken> sampled, std::size_t b,
                                       std::size_t batch, std::span<float> logits) {
  std::int32_t alike = 0;
  for (std::int32_t done = 0; done < steps; done += alike) {
    alike = sequence.steps_alike(steps - done);
    run(sequence, input, alike, 0, !logits.empty(), sequence.sampling.temperature);
    for (std::int32_t step = 0; !sampled.empty() && step < alike; ++step)
      sampled[(done + step) * batch + b] = SampledToken{host_chosen_[step], 0.0f, {}};
    input = host_chosen_[alike - 1];
  }
  if (!logits.empty()) copy_logits(alike - 1, logits);
}

void CudaBackend::decode_with_host(Sequence& sequence, TokenId input, std::int32_t steps,
                                   std::span<SampledToken> sampled, std::size_t b,
                                   std::size_t batch, std::span<float> logits) {
  for (std::int32_t step = 0; step < steps; ++step) {
    run(sequence, input, 1, 0, true, 0.0f);
    copy_logits(0, vocab_logits());
    if (sampled.empty()) continue;
    SampledToken token = sequence.sampler.sample(vocab_logits());
    input = token.token;
    sampled[step * batch + b] = std::move(token);
  }
  if (!logits.empty()) std::ranges::copy(vocab_logits(), logits.begin());
}

void CudaBackend::decode_with_sampler(Sequence& sequence, TokenId input, std::int32_t steps,
                                      std::span<SampledToken> sampled, std::size_t b,
                                      std::size_t batch, std::span<float> logits) {
  const std::span<const TokenId> before = sequence.sampler.tokens();
  std::vector<TokenId> tokens(before.begin(), before.end());
  tokens.push_back(input);
  sampler_.begin(sequence.sampling, tokens, sequence.length + 1, stream_);
  send(sequence, input);
  DecodeParams params = params_;
  params.steps = 1;
  params.first_scored_step = 0;
  params.logits = logits_.as<float>();
  params.temperature = 0.0f;
  params.drawable_vocab_size = drawable_vocab_size(sequence.sampling);
  for (std::int32_t step = 0; step < steps; ++step) {
    params.first_position = static_cast<std::int32_t>(sequence.length) + step;
    interventions_.at_step(sequence.interventions, params.first_position, stream_).tell(params);
    params.chosen = params_.chosen + step;  // -1 if the logits are not finite
    launch(params);
    params.given_tokens = sampler_.choose(logits_.as<float>(), stream_);
  }
  sampler_.fetch(stream_);
  wait(sequence.length, steps, 0);
  for (std::int32_t step = 0; step < steps; ++step) {
    SampledToken token = sampler_.chosen(step);
    sequence.append(std::span(&input, 1));
    input = token.token;
    if (!sampled.empty()) sampled[step * batch + b] = std::move(token);
  }
  if (!logits.empty()) copy_logits(0, logits);
}

}  // namespace clusterfusion::cuda
