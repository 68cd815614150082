// Names of activations, what Engine::steer() and ablate() take, and for whom it holds.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "engine/activation_names.hpp"
#include "engine/fixtures.hpp"
#include "engine/make_engine.hpp"
#include "support/random_model.hpp"

namespace clusterfusion {
namespace {

using namespace test;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

using Kind = ActivationKind;

std::vector<std::string> names_of(const std::vector<NamedSite>& sites) {
  std::vector<std::string> names;
  for (const NamedSite& site : sites) names.push_back(site.name);
  return names;
}

ModelConfig model_of(std::int64_t num_layers, const std::string& type = "gpt_neox") {
  ModelConfig config;
  config.model_type = type;
  config.num_layers = num_layers;
  return config;
}

ActivationSite site_of(const std::string& name) {
  return sites_of({.at = {name}, .layers = {}}, model_of(12)).front().site;
}

TEST(ActivationNames, OfTransformerLens) {
  EXPECT_EQ(site_of("blocks.3.hook_resid_pre"), (ActivationSite{Kind::residual_before, 3}));
  EXPECT_EQ(site_of("blocks.11.hook_attn_out"), (ActivationSite{Kind::attention_out, 11}));
  EXPECT_EQ(site_of("blocks.0.hook_mlp_out"), (ActivationSite{Kind::mlp_out, 0}));
  EXPECT_EQ(site_of("blocks.3.hook_resid_post"), (ActivationSite{Kind::residual_after, 3}));
  EXPECT_EQ(site_of("ln_final.hook_normalized"), (ActivationSite{Kind::final_norm, 0}));
}

TEST(ActivationNames, OfTransformers) {
  EXPECT_EQ(site_of("hidden_states[0]"), (ActivationSite{Kind::residual_before, 0}));
  EXPECT_EQ(site_of("hidden_states[11]"), (ActivationSite{Kind::residual_before, 11}));
  // The last entry of the tuple is normalised.
  EXPECT_EQ(site_of("hidden_states[12]"), (ActivationSite{Kind::final_norm, 0}));
  EXPECT_EQ(site_of("hidden_states[-1]"), (ActivationSite{Kind::final_norm, 0}));
  EXPECT_EQ(site_of("hidden_states[-13]"), (ActivationSite{Kind::residual_before, 0}));
  EXPECT_EQ(site_of("gpt_neox.layers.3"), (ActivationSite{Kind::residual_after, 3}));
  EXPECT_EQ(site_of("gpt_neox.layers.3.attention"), (ActivationSite{Kind::attention_out, 3}));
  EXPECT_EQ(site_of("gpt_neox.layers.3.attention.dense"), (ActivationSite{Kind::attention_out, 3}));
  EXPECT_EQ(site_of("gpt_neox.layers.3.mlp"), (ActivationSite{Kind::mlp_out, 3}));
  EXPECT_EQ(site_of("gpt_neox.layers.3.mlp.dense_4h_to_h"), (ActivationSite{Kind::mlp_out, 3}));
  EXPECT_EQ(site_of("gpt_neox.final_layer_norm"), (ActivationSite{Kind::final_norm, 0}));
}

TEST(ActivationNames, OfTransformersInTheLlamaLayout) {
  for (const char* type : {"llama", "mistral", "qwen2", "qwen3"}) {
    const auto site = [&](const std::string& name) {
      return sites_of({.at = {name}, .layers = {}}, model_of(12, type)).front().site;
    };
    EXPECT_EQ(site("blocks.11.hook_attn_out"), (ActivationSite{Kind::attention_out, 11}));
    EXPECT_EQ(site("hidden_states[-1]"), (ActivationSite{Kind::final_norm, 0}));
    EXPECT_EQ(site("model.layers.3"), (ActivationSite{Kind::residual_after, 3}));
    EXPECT_EQ(site("model.layers.3.self_attn"), (ActivationSite{Kind::attention_out, 3}));
    EXPECT_EQ(site("model.layers.3.self_attn.o_proj"), (ActivationSite{Kind::attention_out, 3}));
    EXPECT_EQ(site("model.layers.3.mlp"), (ActivationSite{Kind::mlp_out, 3}));
    EXPECT_EQ(site("model.layers.3.mlp.down_proj"), (ActivationSite{Kind::mlp_out, 3}));
    EXPECT_EQ(site("model.norm"), (ActivationSite{Kind::final_norm, 0}));
    expect_error(ErrorKind::invalid_argument,
                 AllOf(HasSubstr("'gpt_neox.layers.3.mlp'"), HasSubstr("model.layers.*.mlp")),
                 [&] { site("gpt_neox.layers.3.mlp"); });
  }
}

TEST(ActivationNames, AStarStandsForTheLayers) {
  EXPECT_THAT(names_of(sites_of({}, model_of(2))),
              ElementsAre("hidden_states[0]", "hidden_states[1]", "hidden_states[2]"));
  EXPECT_THAT(
      names_of(sites_of({.at = {"hook_mlp_out", "gpt_neox.final_layer_norm", "gpt_neox.layers.*",
                                "blocks.0.hook_resid_pre"},
                         .layers = {{1, 0}}},
                        model_of(2))),
      ElementsAre("blocks.1.hook_mlp_out", "blocks.0.hook_mlp_out", "gpt_neox.final_layer_norm",
                  "gpt_neox.layers.1", "gpt_neox.layers.0", "blocks.0.hook_resid_pre"));
}

TEST(ActivationNames, RefusesWhatIsNotKnown) {
  const auto refused = [](HiddenStatesOptions options, ErrorKind kind,
                          const testing::Matcher<std::string>& message) {
    expect_error(kind, message, [&] { sites_of(options, model_of(12)); });
  };
  for (const char* name : {"", "*", "blocks.3.hook_q", "blocks.x.hook_resid_pre", "hidden_states[]",
                           "hidden_states[1", "blocks..hook_mlp_out", "blocks.1-.hook_mlp_out",
                           "gpt_neox.layers.3.attention.query_key_value", "blocks.-.hook_mlp_out"})
    refused({.at = {name}, .layers = {}}, ErrorKind::invalid_argument,
            AllOf(HasSubstr("no activation is called"), HasSubstr("blocks.*.hook_resid_pre"),
                  HasSubstr("gpt_neox.final_layer_norm")));
  for (const char* name :
       {"blocks.12.hook_resid_pre", "blocks.-1.hook_resid_pre", "hidden_states[13]",
        "hidden_states[-14]", "gpt_neox.layers.99999999999999999999.mlp"})
    refused({.at = {name}, .layers = {}}, ErrorKind::out_of_range, HasSubstr("expected one in"));
  refused({.at = {"hook_mlp_out"}, .layers = {{12}}}, ErrorKind::out_of_range,
          HasSubstr("expected one in [0, 11]"));
  refused({.at = {}, .layers = {}}, ErrorKind::invalid_argument, HasSubstr("at least one name"));
  refused({.at = {"hook_mlp_out"}, .layers = std::vector<std::int64_t>{}},
          ErrorKind::invalid_argument, HasSubstr("at least one"));
  refused({.at = {"blocks.1.hook_mlp_out"}, .layers = {{1}}}, ErrorKind::invalid_argument,
          HasSubstr("no name has a *"));
}

class Inspection : public testing::Test {
 protected:
  Inspection() {
    ModelConfig config = small_config();
    config.vocab_size = kVocabSize;
    model_ = make_random_model(config);
    engine_ = make_engine(model_, byte_tokenizer(), make_cpu_backend(model_, {}), "a test");
    hidden_ = static_cast<std::size_t>(model_->config().hidden_size);
    for (TokenId token = 0; token < 40; ++token) tokens_.push_back(token * 7 % 300);
  }

  SteeringVector vector(std::int64_t layer, float value = 1.0f) const {
    std::vector<float> values(hidden_);
    for (std::size_t i = 0; i < hidden_; ++i) values[i] = i % 2 == 0 ? value : -value;
    return {.layer = layer, .values = values, .positions = 0};
  }
  std::vector<float> logits() const {
    std::vector<float> logits(tokens_.size() * kVocabSize);
    engine_->logits(tokens_, logits);
    return logits;
  }
  GenerateRequest request() const {
    GenerateRequest request;
    request.prompt_tokens = tokens_;
    request.max_new_tokens = 12;
    request.ignore_eos = true;
    return request;
  }

  std::shared_ptr<const Model> model_;
  std::unique_ptr<Engine> engine_;
  std::size_t hidden_ = 0;
  std::vector<TokenId> tokens_;
};

TEST_F(Inspection, SteeringHoldsForWhatBeginsAfterIt) {
  const std::vector<float> plain = logits();
  const std::vector<TokenId> plain_text = engine_->generate(request()).tokens;
  const auto before = engine_->start({request()});
  before->next();
  engine_->steer({vector(0, 3.0f), vector(1)}, 2.0f);
  const auto during = engine_->start({request()});
  const std::vector<float> steered = logits();
  const std::vector<TokenId> steered_text = engine_->generate(request()).tokens;
  EXPECT_NE(steered, plain);
  EXPECT_NE(steered_text, plain_text);
  engine_->steer({});
  EXPECT_EQ(logits(), plain);
  for (const auto& [generation, text] : {std::pair{&before, plain_text}, {&during, steered_text}}) {
    while ((*generation)->next()) {
    }
    EXPECT_EQ((*generation)->results()[0].tokens, text);
  }
}

TEST_F(Inspection, SteeringAndAblationAreIndependent) {
  const std::vector<float> plain = logits();
  engine_->steer({vector(1)});
  const std::vector<float> steered = logits();
  engine_->ablate({.heads = {{0, {1}}}, .mlps = {1}});
  const std::vector<float> both = logits();
  engine_->steer({});
  const std::vector<float> ablated = logits();
  engine_->steer({vector(1)});
  EXPECT_EQ(logits(), both);
  engine_->ablate({});
  EXPECT_EQ(logits(), steered);
  engine_->steer({});
  EXPECT_EQ(logits(), plain);
  EXPECT_NE(both, ablated);
  EXPECT_NE(both, steered);
  EXPECT_NE(ablated, plain);
}

TEST_F(Inspection, TheScaleMultiplies) {
  engine_->steer({vector(1, 2.0f)});
  const std::vector<float> expected = logits();
  engine_->steer({vector(1, 0.5f)}, 4.0f);
  EXPECT_EQ(logits(), expected);
}

TEST_F(Inspection, ScoresAreSteered) {
  const double plain = engine_->score(tokens_).total;
  const LoglikelihoodRequest pair{{tokens_.begin(), tokens_.begin() + 20},
                                  {tokens_.begin() + 20, tokens_.end()}};
  const double plain_pair = engine_->loglikelihood({&pair, 1}, {}).front().total;
  engine_->steer({vector(1)});
  EXPECT_NE(engine_->score(tokens_).total, plain);
  EXPECT_NE(engine_->loglikelihood({&pair, 1}, {}).front().total, plain_pair);
}

TEST_F(Inspection, RefusesSteeringThatDoesNotFit) {
  const std::int64_t layers = model_->config().num_layers;
  const auto refused = [&](SteeringVector vector, ErrorKind kind, const char* message) {
    expect_error(kind, HasSubstr(message), [&] { engine_->steer({std::move(vector)}); });
  };
  refused(vector(layers), ErrorKind::out_of_range, "expected one in [0, ");
  refused(vector(-1), ErrorKind::out_of_range, "layer -1");
  SteeringVector wrong = vector(0);
  wrong.values.pop_back();
  refused(wrong, ErrorKind::invalid_argument, "the model's hidden_size");
  wrong.values.clear();
  refused(wrong, ErrorKind::invalid_argument, "found 0 numbers");
  wrong = vector(0);
  wrong.positions = 2;
  refused(wrong, ErrorKind::invalid_argument, "for 2 positions");
  wrong.positions = -1;
  refused(wrong, ErrorKind::invalid_argument, "at least 0");
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    wrong = vector(0);
    wrong.values[3] = bad;
    refused(wrong, ErrorKind::non_finite, "element 3");
    expect_error(ErrorKind::non_finite, HasSubstr("scale"),
                 [&] { engine_->steer({vector(0)}, bad); });
  }
  expect_error(ErrorKind::non_finite, HasSubstr("times the scale"),
               [&] { engine_->steer({vector(0, 1e30f)}, 1e30f); });
  expect_error(ErrorKind::invalid_argument, HasSubstr("named twice"), [&] {
    engine_->steer({vector(1), vector(1)});
  });
}

TEST_F(Inspection, RefusesAblationOfWhatIsNotThere) {
  const ModelConfig& config = model_->config();
  expect_error(ErrorKind::out_of_range, HasSubstr("has no head"), [&] {
    engine_->ablate({.heads = {{0, {config.num_heads}}}, .mlps = {}});
  });
  expect_error(ErrorKind::out_of_range, HasSubstr("none of the model's"), [&] {
    engine_->ablate({.heads = {{config.num_layers, {0}}}, .mlps = {}});
  });
  expect_error(ErrorKind::out_of_range, HasSubstr("none of the model's"),
               [&] { engine_->ablate({.heads = {}, .mlps = {-1}}); });
  expect_error(ErrorKind::invalid_argument, HasSubstr("named twice"), [&] {
    engine_->ablate({.heads = {{0, {1, 0, 1}}}, .mlps = {}});
  });
  expect_error(ErrorKind::invalid_argument, HasSubstr("named twice"), [&] {
    engine_->ablate({.heads = {}, .mlps = {0, 0}});
  });
}

TEST_F(Inspection, ARefusedChangeChangesNothing) {
  engine_->steer({vector(1)});
  const std::vector<float> before = logits();
  expect_error(ErrorKind::out_of_range, HasSubstr("layer -1"), [&] {
    engine_->steer({vector(0), vector(-1)});
  });
  expect_error(ErrorKind::out_of_range, HasSubstr("has no head"), [&] {
    engine_->ablate({.heads = {{0, {99}}}, .mlps = {1}});
  });
  EXPECT_EQ(logits(), before);
}

TEST_F(Inspection, ThreadsMaySteerWhileOthersCompute) {
  const std::vector<float> plain = logits();
  engine_->steer({vector(1)});
  const std::vector<float> steered = logits();
  std::atomic<bool> stop = false;
  std::thread other([&] {
    while (!stop) {
      engine_->steer({});
      engine_->steer({vector(1)});
    }
  });
  for (int i = 0; i < 20; ++i) {
    const std::vector<float> found = logits();
    EXPECT_TRUE(found == plain || found == steered);
  }
  stop = true;
  other.join();
}

TEST_F(Inspection, HiddenStatesHaveNamesAndShareMemory) {
  const auto found = engine_->hidden_states(
      tokens_, {.at = {"hidden_states[1]", "hook_resid_pre"}, .layers = {{1}}});
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].name, "hidden_states[1]");
  EXPECT_EQ(found[1].name, "blocks.1.hook_resid_pre");
  EXPECT_EQ(found[0].values->data, found[1].values->data);
  EXPECT_EQ(found[0].values->device.device_type, kDLCPU);
  EXPECT_EQ(found[0].values->shape[0], std::ssize(tokens_));
  EXPECT_EQ(found[0].values->shape[1], model_->config().hidden_size);
}

TEST_F(Inspection, HiddenStatesRefuse) {
  expect_error(ErrorKind::invalid_argument, HasSubstr("at least 1 token"),
               [&] { engine_->hidden_states({}, {}); });
  const std::vector<TokenId> outside = {1, kVocabSize};
  expect_error(ErrorKind::out_of_range, HasSubstr("tokens[1]"),
               [&] { engine_->hidden_states(outside, {}); });
  const std::vector<TokenId> many(static_cast<std::size_t>(model_->config().max_positions) + 1,
                                  TokenId{1});
  expect_error(ErrorKind::invalid_argument, HasSubstr("the context holds"),
               [&] { engine_->hidden_states(many, {}); });
}

TEST(InspectionWithoutADevice, ADeviceThatKnowsNoInterventionsSaysSo) {
  const FakeEngine fake =
      fake_engine(say("abc"), [](FakeState& state) { state.intervenes = false; });
  const auto begun_before = fake.engine->start({one_token_request(60)});
  fake.engine->ablate({.heads = {}, .mlps = {0}});
  expect_error(ErrorKind::unsupported, HasSubstr("knows neither steering nor ablation"),
               [&] { fake.engine->generate(one_token_request(3)); });
  fake.engine->ablate({});
  EXPECT_EQ(fake.engine->generate(one_token_request(3)).text, "abc");
  while (begun_before->next()) {
  }
  EXPECT_THAT(begun_before->results()[0].tokens, testing::SizeIs(60));
  EXPECT_TRUE(fake.state->live.empty());
}

}  // namespace
}  // namespace clusterfusion
