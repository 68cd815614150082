// A backend whose logits a test writes, and that watches how it is used.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "backend/backend.hpp"
#include "base/fail.hpp"
#include "sampling/sampler.hpp"

namespace clusterfusion::test {

// Logits after a sequence's tokens: float32 [vocab].
using Script = std::function<std::vector<float>(std::span<const TokenId> tokens)>;

// What a test may look at after the backend has gone to an engine.
struct FakeState {
  BackendInfo info{.name = "fake",
                   .device = "a script",
                   .kv_bytes_per_position = 16,
                   .max_positions = 64,
                   .prefill_chunk = 4};
  std::function<void()> before_step;  // called in each prefill and decode
  std::vector<std::int64_t> prefill_sizes;
  std::vector<std::size_t> decode_batches;
  std::vector<std::int64_t> burst_starts;   // lengths of the first sequence before decode()
  std::vector<std::int64_t> reserved;       // in the order of creation
  std::map<SequenceId, std::int64_t> live;  // sequences and what they may grow to
  bool asks_to_stop = true;                 // a device may leave out to ask in the middle of a call
  int truncations = 0;
  int ceilings_measured = 0;
  std::vector<TimelineEvent> timeline;
};

class FakeBackend final : public Backend {
 public:
  FakeBackend(std::shared_ptr<FakeState> state, std::int64_t vocab_size, Script script)
      : state_(std::move(state)), vocab_size_(vocab_size), script_(std::move(script)) {}

  const BackendInfo& info() const noexcept override { return state_->info; }

  SequenceId create_sequence(const SamplingParams& sampling) override {
    const Step step(*this);
    const SequenceId id = next_id_++;
    sequences_.emplace(id, Sequence{{}, Sampler(sampling, vocab_size_)});
    state_->live[id] = 0;
    return id;
  }
  void release_sequence(SequenceId sequence) override {
    const Step step(*this);
    EXPECT_EQ(sequences_.erase(sequence), 1u);
    state_->live.erase(sequence);
  }
  std::int64_t length(SequenceId sequence) const override {
    return std::ssize(sequences_.at(sequence).tokens);
  }
  void reserve(SequenceId sequence, std::int64_t positions) override {
    const Step step(*this);
    EXPECT_LE(positions, info().max_positions);
    std::int64_t all = positions;
    for (const auto& [id, reserved] : state_->live) all += reserved;
    require(all <= capacity, ErrorKind::out_of_memory, "the script has {} positions", capacity);
    state_->live[sequence] = positions;
    state_->reserved.push_back(positions);
  }
  void truncate(SequenceId sequence, std::int64_t length) override {
    const Step step(*this);
    ++state_->truncations;
    sequences_.at(sequence).tokens.resize(static_cast<std::size_t>(length));
    sequences_.at(sequence).sampler.truncate(length);
  }

  void prefill(SequenceId id, std::span<const TokenId> tokens,
               const PrefillOutput& output) override {
    const Step step(*this);
    before_step();
    state_->prefill_sizes.push_back(std::ssize(tokens));
    EXPECT_GE(tokens.size(), 1u);
    EXPECT_LE(std::ssize(tokens), info().prefill_chunk);
    Sequence& sequence = sequences_.at(id);
    const auto width = static_cast<std::size_t>(vocab_size_);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      append(id, tokens[i]);
      const std::vector<float> logits = script_(sequence.tokens);
      if (!output.all_logits.empty()) {
        std::ranges::copy(logits, output.all_logits.subspan(i * width, width).begin());
      }
      if (!output.targets.empty() && output.targets[i] >= 0) {
        output.target_logprobs[i] = log_probability(logits, output.targets[i]);
      }
      if (i + 1 == tokens.size() && output.sampled) {
        *output.sampled = sequence.sampler.sample(logits);
      }
    }
  }

  void decode(std::span<const SequenceId> ids, std::span<const TokenId> inputs, std::int32_t steps,
              std::span<SampledToken> sampled, std::span<float> logits) override {
    const Step step(*this);
    before_step();
    state_->decode_batches.push_back(ids.size());
    state_->burst_starts.push_back(length(ids.front()));
    EXPECT_EQ(ids.size(), inputs.size());
    EXPECT_TRUE(steps >= 1 && steps <= info().decode_ahead);
    EXPECT_EQ(sampled.size(), ids.size() * static_cast<std::size_t>(steps));
    EXPECT_TRUE(logits.empty());
    for (std::size_t i = 0; i < sampled.size(); ++i) {
      const std::size_t b = i % ids.size();
      append(ids[b], i < ids.size() ? inputs[b] : sampled[i - ids.size()].token);
      Sequence& sequence = sequences_.at(ids[b]);
      sampled[i] = sequence.sampler.sample(script_(sequence.tokens));
    }
  }

  double measure_read_ceiling() override {
    const Step step(*this);
    ++state_->ceilings_measured;
    return 1e9;
  }

  std::vector<TimelineEvent> record_timeline(SequenceId id, TokenId input) override {
    const Step step(*this);
    state_->burst_starts.push_back(length(id));
    append(id, input);
    return state_->timeline;
  }

  void set_stop_request(StopRequest stop) override { stop_ = std::move(stop); }

  std::int64_t capacity = 1 << 20;  // positions of all sequences together

 private:
  struct Sequence {
    std::vector<TokenId> tokens;
    Sampler sampler;
  };
  // Calls must not overlap.
  struct Step {
    explicit Step(FakeBackend& backend) : busy(backend.busy_) { EXPECT_FALSE(busy.exchange(true)); }
    ~Step() { busy = false; }
    std::atomic<bool>& busy;
  };

  void before_step() const {
    if (state_->before_step) state_->before_step();
    if (state_->asks_to_stop && stop_ && stop_()) throw Stopped{};
  }
  void append(SequenceId id, TokenId token) {
    Sequence& sequence = sequences_.at(id);
    sequence.tokens.push_back(token);
    sequence.sampler.append(std::span(&token, 1));
    EXPECT_LE(std::ssize(sequence.tokens), state_->live.at(id)) << "grew past what was reserved";
  }

  std::shared_ptr<FakeState> state_;
  std::int64_t vocab_size_;
  Script script_;
  StopRequest stop_;
  std::map<SequenceId, Sequence> sequences_;
  SequenceId next_id_ = 0;
  std::atomic<bool> busy_ = false;
};

}  // namespace clusterfusion::test
