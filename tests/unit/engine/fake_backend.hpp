// A backend whose logits a test writes, and that watches how it is used.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <utility>
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
                   .prefill_chunk = 4,
                   .kv_pages = 1 << 14};
  std::function<void()> before_step;  // called in each prefill and decode
  std::vector<std::int64_t> prefill_sizes;
  std::vector<std::size_t> prefill_passes;  // pieces of each prefill_together()
  std::vector<std::size_t> decode_batches;
  std::vector<std::int64_t> burst_starts;  // lengths of the first sequence before decode()
  std::vector<std::int32_t> burst_steps;   // and its steps
  std::vector<TokenId> prefilled;          // the first token of each prefill()'s sequence
  std::vector<std::shared_ptr<const Interventions>> prefilled_under;  // and its interventions
  std::vector<double> decode_times;  // the clock before each decode()
  std::atomic<double> clock = 0;     // seconds; steps and pieces take these
  double step_seconds = 0;
  std::function<double(std::size_t rows)> verify_seconds;  // empty: verify() makes decode steps
  double prefill_token_seconds = 0;
  std::vector<std::size_t> verified_rows;   // of each verify()
  std::vector<std::int64_t> reserved;       // what each reserve() asked for
  std::map<SequenceId, std::int64_t> live;  // sequences and what they may grow to
  bool intervenes = true;                   // a device may know no interventions
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
    sequences_.emplace(id, Sequence{{}, Sampler(sampling, vocab_size_), {}, {}});
    state_->live[id] = 0;
    return id;
  }
  SequenceId create_sequence(const SamplingParams& sampling, std::span<const TokenId> tokens,
                             std::span<const KvPageId> pages,
                             std::shared_ptr<const Interventions> interventions) override {
    if (!state_->intervenes) Backend::intervene(next_id_, interventions);
    const SequenceId id = create_sequence(sampling);
    const Step step(*this);
    Sequence& sequence = sequences_.at(id);
    sequence.tokens.assign(tokens.begin(), tokens.end());
    sequence.sampler.append(tokens);
    sequence.interventions = std::move(interventions);
    EXPECT_EQ(std::ssize(pages), kv_pages_of(std::ssize(tokens)));
    for (const KvPageId page : pages) {
      // The page holds what stood there when its tokens were computed, and all that came before.
      const auto begin = sequence.pages.size() * kKvPagePositions;
      const auto end = std::min(begin + kKvPagePositions, tokens.size());
      const std::vector<TokenId>& content = pages_.at(page).text;
      EXPECT_GE(content.size(), end);
      EXPECT_TRUE(
          std::equal(tokens.begin(), tokens.begin() + static_cast<long>(end), content.begin()))
          << "a page of another text";
      EXPECT_EQ(pages_.at(page).interventions, sequence.interventions)
          << "a page of other interventions";
      ++pages_.at(page).users;
      sequence.pages.push_back(page);
    }
    state_->live[id] = std::ssize(pages) * kKvPagePositions;
    return id;
  }
  void intervene(SequenceId id, std::shared_ptr<const Interventions> interventions) override {
    if (!state_->intervenes) return Backend::intervene(id, interventions);
    sequences_.at(id).interventions = std::move(interventions);
  }
  void release_sequence(SequenceId id) override {
    const Step step(*this);
    for (const KvPageId page : sequences_.at(id).pages) let_go(page);
    EXPECT_EQ(sequences_.erase(id), 1u);
    state_->live.erase(id);
  }
  KvPageId hold_page(SequenceId id, std::int64_t index) override {
    const Step step(*this);
    const KvPageId page = sequences_.at(id).pages.at(static_cast<std::size_t>(index));
    ++pages_.at(page).users;
    return page;
  }
  void drop_page(KvPageId page) override {
    const Step step(*this);
    let_go(page);
  }
  void read_page(KvPageId, std::span<std::byte>) override { fail_no_bytes(); }
  KvPageId add_page(std::span<const std::byte>) override { fail_no_bytes(); }
  std::int64_t kv_pages_in_use() const override { return std::ssize(pages_); }
  SampledToken sample(SequenceId id, std::span<const float> logits) override {
    const Step step(*this);
    return sequences_.at(id).sampler.sample(logits);
  }
  std::int64_t length(SequenceId sequence) const override {
    return std::ssize(sequences_.at(sequence).tokens);
  }
  void reserve(SequenceId id, std::int64_t positions) override {
    const Step step(*this);
    EXPECT_LE(positions, info().max_positions);
    Sequence& sequence = sequences_.at(id);
    // A page that others have as well is not written to.
    const auto first = static_cast<std::size_t>(std::ssize(sequence.tokens) / kKvPagePositions);
    for (std::size_t p = first; p < sequence.pages.size(); ++p) {
      if (pages_.at(sequence.pages[p]).users == 1) continue;
      const KvPageId own = new_page();
      pages_.at(own).text = pages_.at(sequence.pages[p]).text;
      pages_.at(own).interventions = pages_.at(sequence.pages[p]).interventions;
      let_go(std::exchange(sequence.pages[p], own));
    }
    while (std::ssize(sequence.pages) < kv_pages_of(positions)) {
      sequence.pages.push_back(new_page());
    }
    state_->live[id] = std::max(state_->live[id], positions);
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
      state_->clock = state_->clock + state_->prefill_token_seconds;
      const std::vector<float> logits = script_(sequence.tokens);
      if (!output.all_logits.empty()) {
        std::ranges::copy(logits, output.all_logits.subspan(i * width, width).begin());
      }
      if (!output.targets.empty() && output.targets[i] >= 0) {
        const TargetScore score = score_target(logits, output.targets[i]);
        output.target_logprobs[i] = score.logprob;
        if (!output.target_is_likeliest.empty())
          output.target_is_likeliest[i] = score.is_likeliest ? 1 : 0;
      }
      if (i + 1 == tokens.size() && !output.last_logits.empty()) {
        std::ranges::copy(logits, output.last_logits.begin());
      }
      if (i + 1 == tokens.size() && output.sampled) {
        *output.sampled = sequence.sampler.sample(logits);
      }
    }
    state_->prefilled.push_back(sequence.tokens.front());
    state_->prefilled_under.push_back(sequence.interventions);
  }

  void prefill_together(std::span<const PrefillPart> parts) override {
    state_->prefill_passes.push_back(parts.size());
    std::int64_t tokens = 0;
    for (const PrefillPart& part : parts) tokens += std::ssize(part.tokens);
    EXPECT_LE(tokens, info().prefill_chunk);
    Backend::prefill_together(parts);
  }

  void decode(std::span<const SequenceId> ids, std::span<const TokenId> inputs, std::int32_t steps,
              std::span<SampledToken> sampled, std::span<float> logits) override {
    const Step step(*this);
    before_step();
    state_->decode_batches.push_back(ids.size());
    state_->burst_steps.push_back(steps);
    state_->decode_times.push_back(state_->clock);
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
    state_->clock = state_->clock + steps * state_->step_seconds;
  }

  void verify(std::span<Proposal> batch) override {
    if (!state_->verify_seconds) return Backend::verify(batch);
    const Step step(*this);
    before_step();
    std::size_t rows = 0;
    for (Proposal& proposal : batch) {
      EXPECT_LE(std::ssize(proposal.tokens), info().verify_rows);
      EXPECT_LE(length(proposal.sequence) + std::ssize(proposal.tokens),
                state_->live.at(proposal.sequence))
          << "no room for all rows";
      rows += proposal.tokens.size();
      proposal.chosen.clear();
      while (proposal.goes_on()) {
        append(proposal.sequence, proposal.tokens[proposal.chosen.size()]);
        Sequence& sequence = sequences_.at(proposal.sequence);
        proposal.chosen.push_back(sequence.sampler.sample(script_(sequence.tokens)));
      }
    }
    state_->verified_rows.push_back(rows);
    state_->clock = state_->clock + state_->verify_seconds(rows);
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

  std::int64_t capacity = 1 << 14;  // pages of all sequences together

 private:
  struct Sequence {
    std::vector<TokenId> tokens;
    Sampler sampler;
    std::vector<KvPageId> pages;
    std::shared_ptr<const Interventions> interventions;
  };
  struct Page {
    std::int64_t users = 1;
    std::vector<TokenId> text;  // of the sequence, up to the last position that was written here
    std::shared_ptr<const Interventions> interventions;  // of the sequence that wrote last
  };
  [[noreturn]] static void fail_no_bytes() {
    fail(ErrorKind::unsupported, "the pages of a script have no bytes");
  }
  KvPageId new_page() {
    require(std::ssize(pages_) < capacity, ErrorKind::out_of_memory, "the script has {} pages",
            capacity);
    const KvPageId page{next_page_++};
    pages_[page] = {};
    return page;
  }
  void let_go(KvPageId page) {
    if (--pages_.at(page).users == 0) pages_.erase(page);
  }
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
    Page& page = pages_.at(sequence.pages.at((sequence.tokens.size() - 1) / kKvPagePositions));
    EXPECT_EQ(page.users, 1) << "written to a page that others have";
    page.text = sequence.tokens;
    page.interventions = sequence.interventions;
  }

  std::shared_ptr<FakeState> state_;
  std::int64_t vocab_size_;
  Script script_;
  StopRequest stop_;
  std::map<SequenceId, Sequence> sequences_;
  SequenceId next_id_ = 0;
  std::map<KvPageId, Page> pages_;
  std::uintptr_t next_page_ = 1;
  std::atomic<bool> busy_ = false;
};

}  // namespace clusterfusion::test
