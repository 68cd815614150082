// Filters, repetition penalty and log-probabilities on the device: the sampling kernel on logits of
// every kind, and decode steps through it, against the CPU's Sampler on the same logits.
#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "backend/cuda/check.hpp"
#include "backend/cuda/sampling/device_sampler.hpp"
#include "clusterfusion/error.hpp"
#include "gpu_fixture.hpp"
#include "sampling/sampler.hpp"

namespace clusterfusion::test {
namespace {

using cuda::check;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kSteps = 16;

using Logits = std::vector<float>;

// The sampling kernel alone, on logits of the host.
class DeviceChooser {
 public:
  explicit DeviceChooser(std::int64_t vocab)
      : stride_((vocab + 3) / 4 * 4),
        sampler_(vocab, kSteps),
        rows_(kSteps * stride_ * 4, "logits") {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  }
  ~DeviceChooser() { cudaStreamDestroy(stream_); }
  DeviceChooser(const DeviceChooser&) = delete;
  DeviceChooser& operator=(const DeviceChooser&) = delete;

  // A token from each of `rows`, one after the other.
  std::vector<SampledToken> choose(const SamplingParams& params, std::span<const TokenId> history,
                                   std::span<const Logits> rows) {
    sampler_.begin(params, history, std::ssize(history), stream_);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      float* row = rows_.as<float>() + static_cast<std::int64_t>(i) * stride_;
      check(
          cudaMemcpyAsync(row, rows[i].data(), rows[i].size() * 4, cudaMemcpyHostToDevice, stream_),
          "sending logits");
      sampler_.choose(row, stream_);
    }
    sampler_.fetch(stream_);
    check(cudaStreamSynchronize(stream_), "choosing tokens");
    std::vector<SampledToken> tokens;
    for (std::size_t i = 0; i < rows.size(); ++i)
      tokens.push_back(sampler_.chosen(static_cast<std::int32_t>(i)));
    return tokens;
  }

 private:
  std::int64_t stride_;
  cuda::DeviceSampler sampler_;
  cuda::DeviceMemory rows_;
  cudaStream_t stream_ = nullptr;
};

std::vector<SampledToken> chosen_by_cpu(const SamplingParams& params,
                                        std::span<const TokenId> history,
                                        std::span<const Logits> rows) {
  Sampler sampler(params, std::ssize(rows.front()));
  sampler.append(history);
  std::vector<SampledToken> tokens;
  for (const Logits& row : rows) {
    tokens.push_back(sampler.sample(row));
    sampler.append(std::span(&tokens.back().token, 1));
  }
  return tokens;
}

std::string describe(const SamplingParams& p) {
  return "temperature " + std::to_string(p.temperature) + ", top_k " + std::to_string(p.top_k) +
         ", top_p " + std::to_string(p.top_p) + ", min_p " + std::to_string(p.min_p) +
         ", penalty " + std::to_string(p.repetition_penalty) + ", logprobs " +
         std::to_string(p.num_logprobs) + ", drawable " + std::to_string(p.drawable_vocab_size) +
         ", seed " + std::to_string(p.seed);
}

// The sum of a softmax is added up in another order, of exponentials that are one float apart at
// most; then it is rounded to float32.
void expect_near(float found, float expected, const std::string& where) {
  if (found == expected) return;  // -inf among them
  EXPECT_NEAR(found, expected, 1e-6f + 2.4e-7f * std::abs(expected)) << where;
}

void expect_same(std::span<const SampledToken> found, std::span<const SampledToken> expected,
                 const SamplingParams& params, const std::string& what) {
  const std::string settings = what + ": " + describe(params);
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const std::string where = settings + ", step " + std::to_string(i);
    ASSERT_EQ(found[i].token, expected[i].token) << where;
    if (params.num_logprobs >= 0) expect_near(found[i].logprob, expected[i].logprob, where);
    ASSERT_EQ(found[i].top.size(), expected[i].top.size()) << where;
    for (std::size_t rank = 0; rank < expected[i].top.size(); ++rank) {
      ASSERT_EQ(found[i].top[rank].token, expected[i].top[rank].token) << where << " rank " << rank;
      expect_near(found[i].top[rank].logprob, expected[i].top[rank].logprob, where);
    }
  }
}

Logits normal_logits(std::mt19937& random, std::int64_t vocab, float spread) {
  std::normal_distribution<float> normal;
  Logits logits(static_cast<std::size_t>(vocab));
  for (float& logit : logits) logit = spread * normal(random);
  return logits;
}

template <typename T, std::size_t kCount>
T one_of(std::mt19937& random, const std::array<T, kCount>& values) {
  return values[random() % kCount];
}

SamplingParams random_params(std::mt19937& random, std::int32_t vocab) {
  SamplingParams p;
  p.temperature = one_of(random, std::array{0.0f, 0.3f, 0.7f, 1.0f, 2.0f, 1e-6f, 1e6f});
  if (random() % 2)
    p.top_k = std::max(
        0, one_of(random, std::array{1, 2, 5, 40, 500, 20'000, vocab - 1, vocab, vocab + 1}));
  if (random() % 3)
    p.top_p =
        one_of(random, std::array{1e-45f, 1e-6f, 0.1f, 0.5f, 0.9f, 0.95f, 0.999f, 0.9999999f});
  if (random() % 2) p.min_p = one_of(random, std::array{1e-4f, 0.05f, 0.5f, 1.0f});
  if (random() % 2) p.repetition_penalty = one_of(random, std::array{1.3f, 0.5f, 1e-38f, 3e38f});
  p.seed = std::uint64_t{random()} << 32 | random();
  p.num_logprobs = one_of(random, std::array{-1, -1, 0, 1, 5, 100});
  return p;
}

std::vector<TokenId> random_history(std::mt19937& random, std::int64_t vocab) {
  return random_tokens(vocab, static_cast<int>(random() % 300), static_cast<unsigned>(random()));
}

class Filters : public GpuTest {};
class FiltersOfVocabulary : public GpuTest, public testing::WithParamInterface<int> {};

TEST_P(FiltersOfVocabulary, ChooseWhatTheSamplerChooses) {
  const int vocab = GetParam();
  std::mt19937 random(static_cast<unsigned>(vocab));
  DeviceChooser device(vocab);
  for (int round = 0; round < 60; ++round) {
    const std::vector<Logits> rows{normal_logits(random, vocab, 0.01f),
                                   normal_logits(random, vocab, 1.0f),
                                   normal_logits(random, vocab, 5.0f)};
    SamplingParams params = random_params(random, vocab);
    if (random() % 2)
      params.drawable_vocab_size = 1 + static_cast<int>(random() % static_cast<unsigned>(vocab));
    const auto history = random_history(random, vocab);
    expect_same(device.choose(params, history, rows), chosen_by_cpu(params, history, rows), params,
                "round " + std::to_string(round));
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, FiltersOfVocabulary,
                         testing::Values(1, 2, 3, 4, 5, 31, 32, 33, 127, 1000, 4099, 8191, 32'768,
                                         32'771, 50'257, 50'304, 50'432, 100'003));

// Kinds of logits that single out one way or another of being wrong.
Logits awkward_logits(std::mt19937& random, std::int64_t vocab, int kind) {
  const auto size = static_cast<std::size_t>(vocab);
  switch (kind) {
    case 0: return Logits(size, 0.5f);  // all tied
    case 1: {                           // many ties
      Logits logits = normal_logits(random, vocab, 3.0f);
      for (float& logit : logits) logit = std::round(logit);
      return logits;
    }
    case 2: {  // forbidden tokens
      Logits logits = normal_logits(random, vocab, 2.0f);
      for (float& logit : logits)
        if (random() % 3 > 0) logit = -kInf;
      logits[random() % size] = 1.0f;
      return logits;
    }
    case 3: {  // one token that is not forbidden
      Logits logits(size, -kInf);
      logits[random() % size] = -7.0f;
      return logits;
    }
    case 4: {  // both zeros
      Logits logits(size);
      for (float& logit : logits) logit = one_of(random, std::array{0.0f, -0.0f, -1.0f});
      return logits;
    }
    case 5: {  // a few values, far apart
      Logits logits(size);
      for (float& logit : logits)
        logit = one_of(random, std::array{3e38f, -3e38f, 1e-40f, -1e-40f, 1.0f});
      return logits;
    }
    case 6: return normal_logits(random, vocab, 1000.0f);
    default: {  // one that holds nearly all
      Logits logits = normal_logits(random, vocab, 1.0f);
      logits[random() % size] = 40.0f;
      return logits;
    }
  }
}

TEST_F(Filters, AwkwardLogits) {
  for (const int vocab : {1, 2, 7, 33, 1000, 10'007, 50'304}) {
    std::mt19937 random(static_cast<unsigned>(vocab));
    DeviceChooser device(vocab);
    for (int kind = 0; kind < 8; ++kind) {
      for (int round = 0; round < 25; ++round) {
        const std::vector<Logits> rows{awkward_logits(random, vocab, kind)};
        const SamplingParams params = random_params(random, vocab);
        const auto history = random_history(random, vocab);
        expect_same(device.choose(params, history, rows), chosen_by_cpu(params, history, rows),
                    params,
                    "vocabulary " + std::to_string(vocab) + ", kind " + std::to_string(kind));
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(Filters, ThousandSeeds) {
  constexpr std::int64_t kVocab = 50'304;
  constexpr std::array kMixtures{
      SamplingParams{.temperature = 1.0f, .top_k = 50, .top_p = 0.95f},
      SamplingParams{.temperature = 0.8f, .top_p = 0.9f},
      SamplingParams{.temperature = 1.2f, .min_p = 0.02f},
      SamplingParams{.temperature = 0.7f, .top_k = 40, .repetition_penalty = 1.2f},
      SamplingParams{.temperature = 1.0f, .num_logprobs = 3},
  };
  std::mt19937 random(8);
  DeviceChooser device(kVocab);
  for (int seed = 0; seed < 1000; ++seed) {
    SamplingParams params = kMixtures[static_cast<std::size_t>(seed) % kMixtures.size()];
    params.seed = static_cast<std::uint64_t>(seed) * 0x9e3779b97f4a7c15u;
    const std::vector<Logits> rows{normal_logits(random, kVocab, seed % 2 ? 1.0f : 3.0f)};
    const auto history = random_history(random, kVocab);
    expect_same(device.choose(params, history, rows), chosen_by_cpu(params, history, rows), params,
                "seed " + std::to_string(seed));
    if (HasFailure()) return;
  }
}

// The penalty of later steps knows what earlier ones chose.
TEST_F(Filters, RememberWhatTheyChose) {
  constexpr std::int64_t kVocab = 1003;
  std::mt19937 random(5);
  DeviceChooser device(kVocab);
  for (int round = 0; round < 40; ++round) {
    const std::vector<Logits> rows(kSteps, normal_logits(random, kVocab, 2.0f));
    SamplingParams params{.temperature = round % 2 ? 0.0f : 0.5f,
                          .top_k = round % 3 ? 0 : 20,
                          .repetition_penalty = 1.5f,
                          .seed = static_cast<std::uint64_t>(round)};
    const auto history = random_tokens(kVocab, 5, static_cast<unsigned>(round));
    const auto found = device.choose(params, history, rows);
    expect_same(found, chosen_by_cpu(params, history, rows), params,
                "round " + std::to_string(round));
    if (HasFailure()) return;
    const bool all_alike = std::all_of(found.begin(), found.end(), [&](const SampledToken& token) {
      return token.token == found.front().token;
    });
    EXPECT_FALSE(all_alike);
  }
}

TEST_F(Filters, SameEveryTime) {
  constexpr std::int64_t kVocab = 50'304;
  std::mt19937 random(6);
  DeviceChooser device(kVocab);
  const std::vector<Logits> rows(kSteps, normal_logits(random, kVocab, 2.0f));
  const SamplingParams params{.temperature = 1.0f,
                              .top_k = 1000,
                              .top_p = 0.9f,
                              .repetition_penalty = 1.1f,
                              .num_logprobs = 20};
  const auto first = device.choose(params, {}, rows);
  for (int round = 0; round < 20; ++round) {
    const auto again = device.choose(params, {}, rows);
    for (std::size_t i = 0; i < first.size(); ++i) {
      ASSERT_EQ(again[i].token, first[i].token);
      ASSERT_EQ(again[i].logprob, first[i].logprob);  // to the last bit
      for (std::size_t rank = 0; rank < first[i].top.size(); ++rank)
        ASSERT_EQ(again[i].top[rank].logprob, first[i].top[rank].logprob);
    }
  }
}

TEST_F(Filters, ReportLogitsThatCannotBeUsed) {
  for (const int vocab : {1, 5, 301, 50'304}) {
    std::mt19937 random(9);
    DeviceChooser device(vocab);
    for (const bool greedy : {false, true}) {
      const SamplingParams params{.temperature = greedy ? 0.0f : 1.0f,
                                  .top_p = 0.9f,
                                  .repetition_penalty = 1.2f,
                                  .num_logprobs = 2};
      const Logits good = normal_logits(random, vocab, 1.0f);
      Logits nan = good, inf = good;
      nan[random() % nan.size()] = kNan;
      inf[random() % inf.size()] = kInf;
      const Logits forbidden(good.size(), -kInf);
      for (const SampledToken& token :
           device.choose(params, {}, std::vector<Logits>{nan, inf, forbidden}))
        EXPECT_EQ(token.token, -1);
      const std::vector<Logits> usable{good};
      expect_same(device.choose(params, {}, usable), chosen_by_cpu(params, {}, usable), params,
                  "usable logits");
    }
  }
}

// ---------------------------------------------------------------- through the backend

// One sequence of the backend, and a Sampler of the CPU beside it.
class Pair {
 public:
  Pair(Backend& backend, std::int64_t vocab, const SamplingParams& params,
       std::span<const TokenId> prompt)
      : backend_(backend),
        vocab_(vocab),
        params_(params),
        filtered_(backend.create_sequence(params)),
        plain_(backend.create_sequence({})),
        sampler_(params, vocab) {
    backend_.prefill(filtered_, prompt, {});
    backend_.prefill(plain_, prompt, {});
    sampler_.append(prompt);
  }
  ~Pair() {
    backend_.release_sequence(filtered_);
    backend_.release_sequence(plain_);
  }
  Pair(const Pair&) = delete;
  Pair& operator=(const Pair&) = delete;

  // `steps` tokens from the device at once, and one by one from logits on the host.
  TokenId compare(TokenId input, int steps) {
    std::vector<SampledToken> found(static_cast<std::size_t>(steps)), expected;
    Logits last(static_cast<std::size_t>(vocab_)), logits(last.size());
    backend_.decode(std::vector{filtered_}, std::vector{input}, steps, found, last);
    for (int step = 0; step < steps; ++step) {
      backend_.decode(std::vector{plain_}, std::vector{input}, 1, {}, logits);
      sampler_.append(std::span(&input, 1));
      expected.push_back(sampler_.sample(logits));
      input = expected.back().token;
    }
    expect_same(found, expected, params_, "decode");
    EXPECT_EQ(last, logits);
    EXPECT_EQ(backend_.length(filtered_), sampler_.length());
    return input;
  }
  void truncate(std::int64_t length) {
    backend_.truncate(filtered_, length);
    backend_.truncate(plain_, length);
    sampler_.truncate(length);
  }
  std::int64_t length() const { return sampler_.length(); }

 private:
  Backend& backend_;
  std::int64_t vocab_;
  SamplingParams params_;
  SequenceId filtered_, plain_;
  Sampler sampler_;
};

TEST_F(Filters, ThroughTheBackend) {
  const ModelConfig config = config_of({"tiny", 128, 4, 512, 2, 4099, 8});
  const auto backend = make_cuda_backend(make_random_model(config), {});
  for (int mixture = 0; mixture < 64; ++mixture) {
    SamplingParams params;
    params.seed = static_cast<std::uint64_t>(mixture);
    params.temperature = mixture & 32 ? 1.3f : 0.0f;
    if (mixture & 1) params.top_k = 60;
    if (mixture & 2) params.top_p = 0.8f;
    if (mixture & 4) params.min_p = 0.01f;
    if (mixture & 8) params.repetition_penalty = 1.4f;
    if (mixture & 16) params.num_logprobs = 4;
    const auto prompt = random_tokens(config.vocab_size, 1 + mixture * 3, 7);
    Pair pair(*backend, config.vocab_size, params, prompt);
    const TokenId next = pair.compare(5, kSteps);
    pair.truncate(pair.length() - 9);  // what was seen is forgotten
    pair.compare(next, 1);
    pair.compare(9, 7);
    if (HasFailure()) return;
  }
}

// Weights so large that activations overflow.
TEST_F(Filters, NonFiniteLogitsLeaveTheSequenceAsItWas) {
  const ModelConfig config = config_of({"tiny", 128, 4, 512, 2, 301, 8});
  RandomModelOptions options;
  options.matrix_scale = 1e5f;
  const auto backend = make_cuda_backend(make_random_model(config, options), {});
  for (const SamplingParams& params :
       {SamplingParams{}, SamplingParams{.temperature = 1.0f},
        SamplingParams{.temperature = 1.0f, .top_k = 5, .num_logprobs = 2},
        SamplingParams{.repetition_penalty = 1.2f}}) {
    const SequenceId id = backend->create_sequence(params);
    std::vector<SampledToken> sampled(kSteps);
    EXPECT_THAT(
        [&] { backend->decode(std::vector{id}, std::vector<TokenId>{3}, kSteps, sampled, {}); },
        testing::ThrowsMessage<Error>(
            testing::HasSubstr("the logits after position 0 are not finite")))
        << describe(params);
    EXPECT_EQ(backend->length(id), 0) << describe(params);
    backend->release_sequence(id);
  }
}

}  // namespace
}  // namespace clusterfusion::test
