// Many sequences in one launch: a row has the same bits alone and in any company.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "gpu_fixture.hpp"
#include "support/random_interventions.hpp"

namespace clusterfusion::test {
namespace {

struct Request {
  std::shared_ptr<const Interventions> interventions = nullptr;
  std::vector<TokenId> prompt = {};
  SamplingParams sampling;
  TokenId input = 0;
};

// What a sequence has chosen, and the logits behind the last step.
struct Outcome {
  std::vector<TokenId> tokens;
  std::vector<float> logits;
};

Request random_request(std::mt19937& random, std::int64_t vocab, int longest, bool filters) {
  Request request;
  const int length = std::uniform_int_distribution(1, longest)(random);
  request.prompt = random_tokens(vocab, length, random());
  if (random() % 2 == 0) {
    request.sampling.temperature = 0.7f + static_cast<float>(random() % 8) * 0.1f;
    request.sampling.seed = random();
    if (filters && random() % 3 == 0) request.sampling.top_k = 20;
  }
  if (filters && random() % 5 == 0) request.sampling.repetition_penalty = 1.2f;
  request.input = static_cast<TokenId>(random() % vocab);
  return request;
}

std::vector<Outcome> run(Backend& backend, std::int64_t vocab, std::span<const Request> requests,
                         int bursts, std::int32_t steps) {
  std::vector<SequenceId> ids;
  std::vector<TokenId> inputs;
  for (const Request& request : requests) {
    ids.push_back(backend.create_sequence(request.sampling));
    backend.intervene(ids.back(), request.interventions);
    backend.prefill(ids.back(), request.prompt, {});
    inputs.push_back(request.input);
  }
  std::vector<Outcome> outcomes(requests.size());
  const auto width = static_cast<std::size_t>(vocab);
  std::vector<float> logits(requests.size() * width);
  for (int burst = 0; burst < bursts; ++burst) {
    std::vector<SampledToken> sampled(requests.size() * steps);
    backend.decode(ids, inputs, steps, sampled, logits);
    for (std::size_t row = 0; row < requests.size(); ++row) {
      for (std::int32_t step = 0; step < steps; ++step)
        outcomes[row].tokens.push_back(sampled[step * requests.size() + row].token);
      inputs[row] = outcomes[row].tokens.back();
      outcomes[row].logits.assign(logits.begin() + row * width, logits.begin() + (row + 1) * width);
    }
  }
  for (const SequenceId id : ids) backend.release_sequence(id);
  return outcomes;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

class Rows : public GpuTest, public testing::WithParamInterface<Shape> {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    config = config_of(GetParam());
    BackendOptions options;
    options.mode = DecodeMode::throughput;
    backend = make_cuda_backend(make_random_model(config), options);
    random.seed(std::hash<std::string>{}(GetParam().name) % 1000);
  }

  void compare_many(std::initializer_list<int> counts,
                    const std::shared_ptr<const Interventions>& interventions = nullptr) {
    const int longest = std::min(GetParam().positions * 2, 300);
    for (const int count : counts) {
      std::vector<Request> requests;
      for (int i = 0; i < count; ++i) {
        requests.push_back(random_request(random, config.vocab_size, longest, false));
        requests.back().interventions = interventions;
      }
      const auto together = run(*backend, config.vocab_size, requests, 2, 3);
      for (int i = 0; i < count; i += 1 + static_cast<int>(random() % 8)) {
        const auto alone =
            run(*backend, config.vocab_size, std::span(requests).subspan(i, 1), 2, 3);
        ASSERT_EQ(together[i].tokens, alone[0].tokens) << "row " << i << " of " << count;
        ASSERT_TRUE(same_bits(together[i].logits, alone[0].logits))
            << "row " << i << " of " << count;
      }
    }
  }

  void compare(bool filters, int mixtures, int longest) {
    for (int mixture = 0; mixture < mixtures; ++mixture) {
      const int count = mixture < 5 ? 1 << mixture : 1 + static_cast<int>(random() % 40);
      const auto steps = static_cast<std::int32_t>(1 + random() % 16);
      std::vector<Request> requests;
      for (int i = 0; i < count; ++i)
        requests.push_back(random_request(random, config.vocab_size, longest, filters));
      const auto together = run(*backend, config.vocab_size, requests, 2, steps);
      for (int i = 0; i < count; ++i) {
        const auto alone =
            run(*backend, config.vocab_size, std::span(requests).subspan(i, 1), 2, steps);
        ASSERT_EQ(together[i].tokens, alone[0].tokens)
            << "row " << i << " of " << count << ", " << steps << " steps, mixture " << mixture;
        ASSERT_TRUE(same_bits(together[i].logits, alone[0].logits))
            << "row " << i << " of " << count << ", " << steps << " steps, mixture " << mixture;
      }
    }
  }

  ModelConfig config;
  std::unique_ptr<Backend> backend;
  std::mt19937 random;
};

TEST_P(Rows, AreTheSameInAnyCompany) {
  compare(false, 8, std::min(GetParam().positions * 3, 2500));
}
// More than the streaming kernel takes; and each row alone is computed by it.
TEST_P(Rows, AreTheSameAmongMany) { compare_many({17, 32, 33, 64, 65, 129, 256, 300}); }
TEST_P(Rows, AreTheSameAmongManyWithInterventions) {
  const auto interventions = steered(config, {0, config.num_layers - 1});
  interventions->layers[0].ablated_heads = {1, config.num_heads - 1};
  interventions->layers[config.num_layers - 1].ablates_mlp = true;
  compare_many({40}, interventions);
}
TEST_P(Rows, AreTheSameInAnyCompanyWithFilters) { compare(true, 3, 40); }

INSTANTIATE_TEST_SUITE_P(Unstreamed, Rows, testing::ValuesIn(unstreamed_shapes()),
                         [](const auto& info) { return info.param.name; });
INSTANTIATE_TEST_SUITE_P(Shapes, Rows, testing::ValuesIn(gpu_shapes()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace clusterfusion::test
