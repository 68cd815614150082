// Steering and ablation against models whose weights are changed to the same effect, and
// activations against each other.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>

#include "base/tensor_view.hpp"
#include "sequences.hpp"
#include "support/random_interventions.hpp"
#include "support/random_model.hpp"

namespace clusterfusion::test {
namespace {

using InterventionsPointer = std::shared_ptr<const Interventions>;

// Of GPT-NeoX, one of its with other norms, MLP and heads, and of the Llama layout.
enum class Kind { parallel, sequential, gated, llama };

class CpuInterventions : public testing::TestWithParam<Kind> {
 protected:
  static constexpr std::int64_t kSteered = 11;  // positions

  CpuInterventions() {
    config_ = small_config();
    config_.hidden_size = 120;  // neither it nor the heads fill whole vectors
    config_.num_heads = 3;
    config_.head_dim = 40;
    config_.rotary_dim = 10;
    config_.intermediate_size = 250;
    config_.num_layers = 3;
    config_.dtype = DType::float32;
    config_.parallel_residual = GetParam() == Kind::parallel;
    if (GetParam() == Kind::gated) {
      config_.norm = NormKind::rms_norm;
      config_.gated_mlp = true;
      config_.num_kv_heads = 1;
      config_.attention_bias = false;
    }
    if (GetParam() == Kind::llama) {
      config_ = small_llama_config();
      config_.hidden_size = 120;
      config_.mlp_bias = true;  // what some tests change
      config_.dtype = DType::float32;
    }
    model_ = make_random_model(config_);
    backend_ = make_cpu_backend(model_, {});
    tokens_ = random_tokens(config_, 80, 5);
  }

  std::vector<float> logits(const InterventionsPointer& interventions) {
    return logits(*backend_, interventions);
  }
  std::vector<float> logits(Backend& backend, const InterventionsPointer& interventions) {
    const SequenceId id = backend.create_sequence({});
    backend.intervene(id, interventions);
    std::vector<float> result = prefill_logits(backend, config_, id, tokens_);
    backend.release_sequence(id);
    return result;
  }
  // Of a model whose weights `change` has changed.
  std::vector<float> logits_of_changed(const std::function<void(const Model&)>& change) {
    const auto model = make_random_model(config_);
    change(*model);
    return logits(*make_cpu_backend(model, {}), nullptr);
  }
  std::vector<float> decoded(const InterventionsPointer& interventions) {
    const SequenceId id = backend_->create_sequence({});
    backend_->intervene(id, interventions);
    std::vector<float> all;
    for (const TokenId token : tokens_) {
      const std::vector<float> one = decode_logits(*backend_, config_, id, token);
      all.insert(all.end(), one.begin(), one.end());
    }
    backend_->release_sequence(id);
    return all;
  }

  // Some of everything.
  InterventionsPointer mixture() const {
    auto interventions = std::make_shared<Interventions>(*steered(config_, {0, 2}));
    interventions->layers[1] = steered_at(config_, {1}, kSteered)->layers[1];
    interventions->layers[0].ablated_heads = {0, 2};
    interventions->layers[1].ablates_mlp = true;
    return interventions;
  }

  ModelConfig config_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Backend> backend_;
  std::vector<TokenId> tokens_;
};

float* values_of(const DLTensor& tensor) { return static_cast<float*>(tensor.data); }

void expect_near(const std::vector<float>& found, const std::vector<float>& expected,
                 double bound) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i)
    ASSERT_NEAR(found[i], expected[i], bound) << "element " << i;
}

TEST_P(CpuInterventions, SteeringTheFirstLayerIsAShiftOfTheEmbedding) {
  const auto interventions = steered(config_, {0});
  const std::vector<float> expected = logits_of_changed([&](const Model& model) {
    float* row = values_of(model.weights().embedding);
    for (std::int64_t token = 0; token < config_.vocab_size; ++token, row += config_.hidden_size)
      for (std::int64_t i = 0; i < config_.hidden_size; ++i)
        row[i] += interventions->layers[0].steering[static_cast<std::size_t>(i)];
  });
  EXPECT_EQ(logits(interventions), expected);
  EXPECT_NE(logits(nullptr), expected);
}

TEST_P(CpuInterventions, SteeringALayerIsABiasOfTheMlpBeforeIt) {
  const auto interventions = steered(config_, {1, 2});
  const std::vector<float> expected = logits_of_changed([&](const Model& model) {
    for (const std::size_t layer : {1, 2})
      for (std::int64_t i = 0; i < config_.hidden_size; ++i)
        values_of(model.weights().layers[layer - 1][LayerTensor::mlp_down_bias])[i] +=
            interventions->layers[layer].steering[static_cast<std::size_t>(i)];
  });
  expect_near(logits(interventions), expected, 1e-4);
}

TEST_P(CpuInterventions, AnAblatedHeadIsOneThatTheOutputProjectionDoesNotSee) {
  auto interventions = no_interventions(config_);
  interventions->layers[1].ablated_heads = {0, 2};
  const std::vector<float> expected = logits_of_changed([&](const Model& model) {
    float* weight = values_of(model.weights().layers[1][LayerTensor::attention_out_weight]);
    for (std::int64_t row = 0; row < config_.hidden_size; ++row)
      for (const std::int64_t head : {0, 2})
        std::fill_n(weight + row * config_.attention_size() + head * config_.head_dim,
                    config_.head_dim, 0.0f);
  });
  expect_near(logits(interventions), expected, 1e-4);
}

TEST_P(CpuInterventions, AnAblatedMlpIsOneWithoutSecondMatrixAndBias) {
  auto interventions = no_interventions(config_);
  interventions->layers[2].ablates_mlp = true;
  const std::vector<float> expected = logits_of_changed([&](const Model& model) {
    const LayerWeights& layer = model.weights().layers[2];
    const DLTensor& weight = layer[LayerTensor::mlp_down_weight];
    std::fill_n(values_of(weight), num_elements(weight), 0.0f);
    std::fill_n(values_of(layer[LayerTensor::mlp_down_bias]), config_.hidden_size, 0.0f);
  });
  expect_near(logits(interventions), expected, 1e-5);
}

TEST_P(CpuInterventions, PositionsAreThoseOfTheSequence) {
  const auto some = steered_at(config_, {1}, kSteered);
  // The same vectors by hand: as many rows as there are positions, zero behind the last.
  auto padded = std::make_shared<Interventions>(*some);
  padded->layers[1].steering.resize(tokens_.size() * static_cast<std::size_t>(config_.hidden_size));
  padded->layers[1].steered_positions = std::ssize(tokens_);
  EXPECT_EQ(logits(some), logits(padded));
  EXPECT_NE(logits(some), logits(nullptr));
}

TEST_P(CpuInterventions, OffGivesTheSameBits) {
  const std::vector<float> before = logits(nullptr);
  EXPECT_NE(logits(mixture()), before);
  EXPECT_EQ(logits(nullptr), before);
  EXPECT_EQ(logits(no_interventions(config_)), before);
}

TEST_P(CpuInterventions, DecodeStepsGiveTheBitsOfAPrefill) {
  EXPECT_EQ(decoded(mixture()), logits(mixture()));
}

TEST_P(CpuInterventions, ABatchEqualsItsMembersAlone) {
  const std::vector<InterventionsPointer> all = {
      nullptr,  mixture(), steered(config_, {1}), nullptr, steered_at(config_, {0}, kSteered),
      mixture()};
  std::vector<SequenceId> ids;
  for (const InterventionsPointer& its : all) {
    ids.push_back(backend_->create_sequence({}));
    backend_->intervene(ids.back(), its);
  }
  const auto vocab = static_cast<std::size_t>(config_.vocab_size);
  std::vector<std::vector<float>> expected;
  for (const InterventionsPointer& its : all) expected.push_back(logits(its));
  for (std::size_t t = 0; t < tokens_.size(); ++t) {
    const std::vector<TokenId> inputs(all.size(), tokens_[t]);
    std::vector<float> found(all.size() * vocab);
    backend_->decode(ids, inputs, 1, {}, found);
    for (std::size_t b = 0; b < all.size(); ++b)
      ASSERT_TRUE(std::equal(found.begin() + static_cast<std::ptrdiff_t>(b * vocab),
                             found.begin() + static_cast<std::ptrdiff_t>((b + 1) * vocab),
                             expected[b].begin() + static_cast<std::ptrdiff_t>(t * vocab)))
          << "sequence " << b << " at position " << t;
  }
}

TEST_P(CpuInterventions, BeginWithASequence) {
  const SequenceId id = backend_->create_sequence({});
  prefill_logits(*backend_, config_, id, tokens_);
  try {
    backend_->intervene(id, mixture());
    FAIL() << "expected an error";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::invalid_argument);
    EXPECT_NE(std::string(error.what()).find("interventions begin with a sequence"),
              std::string::npos)
        << error.what();
  }
}

// All activations of a run in which logits are asked for as well.
class CpuActivations : public CpuInterventions {
 protected:
  void run(const InterventionsPointer& interventions) {
    std::vector<ActivationSite> sites = {{ActivationKind::final_norm, 0}};
    for (std::int64_t layer = 0; layer < config_.num_layers; ++layer)
      for (const auto kind : {ActivationKind::residual_before, ActivationKind::attention_out,
                              ActivationKind::mlp_out, ActivationKind::residual_after})
        sites.push_back({kind, layer});
    values_.assign(sites.size(), std::vector<float>(tokens_.size() * 120, -1.0f));
    logits_.resize(tokens_.size() * static_cast<std::size_t>(config_.vocab_size));
    PrefillOutput output;
    output.all_logits = logits_;
    for (std::size_t i = 0; i < sites.size(); ++i)
      output.activations.push_back({sites[i], values_[i].data()});
    const SequenceId id = backend_->create_sequence({});
    backend_->intervene(id, interventions);
    backend_->prefill(id, tokens_, output);
    backend_->release_sequence(id);
    sites_ = sites;
  }
  const std::vector<float>& at(ActivationKind kind, std::int64_t layer) const {
    const auto found = std::ranges::find(sites_, ActivationSite{kind, layer});
    return values_[static_cast<std::size_t>(found - sites_.begin())];
  }

  std::vector<ActivationSite> sites_;
  std::vector<std::vector<float>> values_;
  std::vector<float> logits_;
};

TEST_P(CpuActivations, AddUpToTheResidualStream) {
  const auto interventions = mixture();
  run(interventions);
  for (std::int64_t layer = 0; layer < config_.num_layers; ++layer) {
    const auto& before = at(ActivationKind::residual_before, layer);
    const auto& attention = at(ActivationKind::attention_out, layer);
    const auto& mlp = at(ActivationKind::mlp_out, layer);
    const auto& after = at(ActivationKind::residual_after, layer);
    for (std::size_t i = 0; i < before.size(); ++i)
      ASSERT_NEAR(after[i], before[i] + attention[i] + mlp[i], 1e-5);
    const bool is_zero = std::ranges::all_of(mlp, [](float value) { return value == 0; });
    EXPECT_EQ(is_zero, interventions->layers[static_cast<std::size_t>(layer)].ablates_mlp);
    if (layer + 1 == config_.num_layers) continue;
    // What lies between two layers is what steers the second one.
    const auto& next = at(ActivationKind::residual_before, layer + 1);
    const auto& its = interventions->layers[static_cast<std::size_t>(layer + 1)];
    for (std::size_t i = 0; i < after.size(); ++i) {
      const auto hidden = static_cast<std::size_t>(config_.hidden_size);
      const float* steering = its.steering_at(static_cast<std::int64_t>(i / hidden), 120);
      ASSERT_EQ(next[i], steering == nullptr ? after[i] : after[i] + steering[i % hidden]);
    }
  }
}

TEST_P(CpuActivations, TheFirstIsTheEmbeddingAndTheLastWhatTheLmHeadReads) {
  run(nullptr);
  const float* embedding = values_of(model_->weights().embedding);
  const float* lm_head = values_of(model_->weights().lm_head);
  const auto& first = at(ActivationKind::residual_before, 0);
  const auto& last = at(ActivationKind::final_norm, 0);
  for (std::size_t t = 0; t < tokens_.size(); ++t) {
    for (std::size_t i = 0; i < 120; ++i)
      ASSERT_EQ(first[t * 120 + i], embedding[static_cast<std::size_t>(tokens_[t]) * 120 + i]);
    double logit = 0;
    for (std::size_t i = 0; i < 120; ++i)
      logit += static_cast<double>(last[t * 120 + i]) * lm_head[7 * 120 + i];
    ASSERT_NEAR(logits_[t * static_cast<std::size_t>(config_.vocab_size) + 7], logit, 1e-4);
  }
}

TEST_P(CpuActivations, TakingThemChangesNoBit) {
  for (const InterventionsPointer& its : {InterventionsPointer(), mixture()}) {
    run(its);
    EXPECT_EQ(logits_, logits(its));
  }
}

std::string name_of_kind(const testing::TestParamInfo<Kind>& info) {
  return info.param == Kind::parallel     ? "parallel"
         : info.param == Kind::sequential ? "sequential"
         : info.param == Kind::gated      ? "gated"
                                          : "llama";
}
INSTANTIATE_TEST_SUITE_P(Layers, CpuInterventions,
                         testing::Values(Kind::parallel, Kind::sequential, Kind::gated,
                                         Kind::llama),
                         name_of_kind);
INSTANTIATE_TEST_SUITE_P(Layers, CpuActivations,
                         testing::Values(Kind::parallel, Kind::sequential, Kind::gated,
                                         Kind::llama),
                         name_of_kind);

}  // namespace
}  // namespace clusterfusion::test
