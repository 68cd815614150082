// Looking inside and steering on a GPU, against the CPU backend; without interventions, the same
// bits as ever.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "gpu_fixture.hpp"
#include "support/random_interventions.hpp"

namespace clusterfusion::test {
namespace {

using InterventionsPointer = std::shared_ptr<const Interventions>;

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

double tolerance(const ModelConfig& config) { return config.dtype == DType::float16 ? 4e-3 : 3e-2; }

// Every activation there is.
std::vector<ActivationSite> all_sites(const ModelConfig& config) {
  std::vector<ActivationSite> sites = {{ActivationKind::final_norm, 0}};
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer)
    for (const auto kind : {ActivationKind::residual_before, ActivationKind::attention_out,
                            ActivationKind::mlp_out, ActivationKind::residual_after})
      sites.push_back({kind, layer});
  return sites;
}

// All sites' activations one after the other, on the host.
std::vector<std::vector<float>> activations(Backend& backend, const ModelConfig& config,
                                            std::span<const TokenId> tokens,
                                            const InterventionsPointer& interventions) {
  const auto count = static_cast<std::int64_t>(tokens.size());
  std::vector<std::shared_ptr<DLTensor>> tensors;
  PrefillOutput output;
  for (const ActivationSite& site : all_sites(config)) {
    tensors.push_back(backend.allocate_activation(count, config.hidden_size));
    output.activations.push_back({site, static_cast<float*>(tensors.back()->data)});
  }
  const SequenceId id = backend.create_sequence({});
  backend.intervene(id, interventions);
  backend.prefill(id, tokens, output);
  backend.release_sequence(id);
  std::vector<std::vector<float>> results;
  for (const auto& tensor : tensors) {
    std::vector<float>& values = results.emplace_back(count * config.hidden_size);
    EXPECT_EQ(cudaMemcpy(values.data(), tensor->data, values.size() * 4, cudaMemcpyDefault),
              cudaSuccess);
  }
  return results;
}

// Logits behind a prompt, and behind each of the decode steps whose inputs follow it.
std::vector<float> logits_of(Backend& backend, const ModelConfig& config,
                             std::span<const TokenId> tokens, std::size_t prompt,
                             const InterventionsPointer& interventions) {
  const auto vocab = static_cast<std::size_t>(config.vocab_size);
  std::vector<float> logits(tokens.size() * vocab, std::numeric_limits<float>::quiet_NaN());
  const SequenceId id = backend.create_sequence({});
  backend.intervene(id, interventions);
  PrefillOutput output;
  output.all_logits = std::span(logits).first(prompt * vocab);
  backend.prefill(id, tokens.first(prompt), output);
  for (std::size_t i = prompt; i < tokens.size(); ++i)
    backend.decode(std::vector{id}, tokens.subspan(i, 1), 1, {},
                   std::span(logits).subspan(i * vocab, vocab));
  backend.release_sequence(id);
  return logits;
}

// Greedy tokens of several sequences decoded together, `steps` at a time.
std::vector<std::vector<TokenId>> greedy(Backend& backend, std::span<const TokenId> prompt,
                                         std::span<const InterventionsPointer> interventions,
                                         std::int32_t steps) {
  std::vector<SequenceId> ids;
  std::vector<TokenId> inputs;
  for (const InterventionsPointer& its : interventions) {
    ids.push_back(backend.create_sequence({}));
    backend.intervene(ids.back(), its);
    SampledToken first;
    PrefillOutput output;
    output.sampled = &first;
    backend.prefill(ids.back(), prompt, output);
    inputs.push_back(first.token);
  }
  std::vector<std::vector<TokenId>> tokens(ids.size());
  for (int done = 0; done < 16; done += steps) {
    std::vector<SampledToken> sampled(ids.size() * static_cast<std::size_t>(steps));
    backend.decode(ids, inputs, steps, sampled, {});
    for (std::size_t i = 0; i < sampled.size(); ++i)
      tokens[i % ids.size()].push_back(sampled[i].token);
    for (std::size_t row = 0; row < ids.size(); ++row) inputs[row] = tokens[row].back();
  }
  for (const SequenceId id : ids) backend.release_sequence(id);
  return tokens;
}

std::vector<std::int64_t> all_layers(const ModelConfig& config) {
  std::vector<std::int64_t> layers(static_cast<std::size_t>(config.num_layers));
  for (std::size_t i = 0; i < layers.size(); ++i) layers[i] = static_cast<std::int64_t>(i);
  return layers;
}

InterventionsPointer ablated(const ModelConfig& config, bool heads, bool mlps) {
  auto interventions = no_interventions(config);
  for (LayerIntervention& layer : interventions->layers) {
    for (std::int64_t head = 0; heads && head < config.num_heads; head += 2)
      layer.ablated_heads.push_back(head);
    layer.ablates_mlp = mlps;
  }
  return interventions;
}

// What is tried of everything: alone and mixed.
struct Case {
  const char* name;
  InterventionsPointer interventions;
};
std::vector<Case> cases(const ModelConfig& config) {
  const auto everything = std::make_shared<Interventions>(*steered(config, all_layers(config)));
  everything->layers.back().ablates_mlp = true;
  everything->layers.front().ablates_mlp = config.num_layers > 1;
  everything->layers.front().ablated_heads = {1};
  return {{"first layer", steered(config, {0})},
          {"last layer", steered(config, {config.num_layers - 1})},
          {"all layers", steered(config, all_layers(config))},
          {"positions", steered_at(config, all_layers(config), 9)},
          {"heads", ablated(config, true, false)},
          {"MLPs", ablated(config, false, true)},
          {"everything", everything}};
}

class GpuInterventions : public GpuTest, public testing::WithParamInterface<Shape> {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    config_ = config_of(GetParam());
    model_ = make_random_model(config_);
    cpu_ = make_cpu_backend(model_, {});
    tokens_ = random_tokens(config_.vocab_size, 24, 7);
  }
  std::unique_ptr<Backend> on_gpu(DecodeMode mode) const {
    BackendOptions options;
    options.mode = mode;
    return make_cuda_backend(model_, options);
  }

  ModelConfig config_;
  std::shared_ptr<const Model> model_;
  std::unique_ptr<Backend> cpu_;
  std::vector<TokenId> tokens_;
};

TEST_P(GpuInterventions, HiddenStatesEqualTheCpus) {
  const auto gpu = on_gpu(DecodeMode::latency);
  const auto sites = all_sites(config_);
  for (const InterventionsPointer& its :
       {InterventionsPointer(), cases(config_).back().interventions}) {
    for (const std::size_t count : {std::size_t{1}, tokens_.size()}) {
      const std::span<const TokenId> tokens = std::span(tokens_).first(count);
      const auto found = activations(*gpu, config_, tokens, its);
      const auto expected = activations(*cpu_, config_, tokens, its);
      for (std::size_t i = 0; i < sites.size(); ++i) {
        const bool is_zero = std::ranges::all_of(expected[i], [](float v) { return v == 0; });
        EXPECT_EQ(is_zero, its != nullptr && sites[i].kind == ActivationKind::mlp_out &&
                               its->layers[sites[i].layer].ablates_mlp);
        if (is_zero)
          EXPECT_TRUE(std::ranges::all_of(found[i], [](float v) { return v == 0; }));
        else
          EXPECT_LT(relative_error(found[i], expected[i]), 2 * tolerance(config_))
              << "kind " << static_cast<int>(sites[i].kind) << " of layer " << sites[i].layer;
      }
    }
  }
}

TEST_P(GpuInterventions, LogitsEqualTheCpus) {
  for (const DecodeMode mode : {DecodeMode::latency, DecodeMode::throughput}) {
    const auto gpu = on_gpu(mode);
    const auto plain = logits_of(*cpu_, config_, tokens_, 5, nullptr);
    for (const auto& [name, interventions] : cases(config_)) {
      const auto expected = logits_of(*cpu_, config_, tokens_, 5, interventions);
      const auto found = logits_of(*gpu, config_, tokens_, 5, interventions);
      EXPECT_LT(relative_error(found, expected), 2 * tolerance(config_))
          << name << ", " << name_of(mode);
      EXPECT_GT(relative_error(plain, expected), 4 * tolerance(config_))
          << name << " changes too little to be seen";
    }
  }
}

TEST_P(GpuInterventions, OffGivesTheSameBits) {
  for (const DecodeMode mode : {DecodeMode::latency, DecodeMode::throughput}) {
    const auto gpu = on_gpu(mode);
    const auto before = logits_of(*gpu, config_, tokens_, 5, nullptr);
    for (const auto& [name, interventions] : cases(config_)) {
      const auto changed = logits_of(*gpu, config_, tokens_, 5, interventions);
      EXPECT_FALSE(same_bits(changed, before)) << name;
      EXPECT_TRUE(same_bits(logits_of(*gpu, config_, tokens_, 5, nullptr), before)) << name;
      EXPECT_TRUE(same_bits(logits_of(*gpu, config_, tokens_, 5, interventions), changed)) << name;
    }
  }
}

TEST_P(GpuInterventions, ATextDependsOnItsOwnInterventionsAlone) {
  std::vector<InterventionsPointer> all = {nullptr};
  for (const Case& each : cases(config_)) all.push_back(each.interventions);
  all.push_back(nullptr);
  all.push_back(all[1]);
  for (const DecodeMode mode : {DecodeMode::latency, DecodeMode::throughput}) {
    const auto gpu = on_gpu(mode);
    const std::span<const TokenId> prompt = std::span(tokens_).first(3);
    const auto together = greedy(*gpu, prompt, all, 8);
    EXPECT_EQ(together, greedy(*gpu, prompt, all, 1)) << name_of(mode);
    for (std::size_t i = 0; i < all.size(); ++i)
      EXPECT_EQ(greedy(*gpu, prompt, std::span(all).subspan(i, 1), 16).front(), together[i])
          << "sequence " << i << ", " << name_of(mode);
  }
}

TEST_P(GpuInterventions, ActivationsStayOnTheDeviceAndOutliveTheBackend) {
  std::shared_ptr<DLTensor> tensor;
  {
    const auto gpu = on_gpu(DecodeMode::latency);
    tensor = gpu->allocate_activation(3, config_.hidden_size);
    PrefillOutput output;
    output.activations = {
        {{ActivationKind::residual_before, 0}, static_cast<float*>(tensor->data)}};
    const SequenceId id = gpu->create_sequence({});
    gpu->prefill(id, std::span(tokens_).first(3), output);
  }
  EXPECT_EQ(tensor->device.device_type, kDLCUDA);
  cudaPointerAttributes attributes{};
  ASSERT_EQ(cudaPointerGetAttributes(&attributes, tensor->data), cudaSuccess);
  EXPECT_EQ(attributes.type, cudaMemoryTypeDevice);
  std::vector<float> values(3 * config_.hidden_size);
  EXPECT_EQ(cudaMemcpy(values.data(), tensor->data, values.size() * 4, cudaMemcpyDefault),
            cudaSuccess);
  EXPECT_TRUE(std::ranges::any_of(values, [](float value) { return value != 0; }));
}

TEST_P(GpuInterventions, BeginWithASequence) {
  const auto gpu = on_gpu(DecodeMode::latency);
  const SequenceId id = gpu->create_sequence({});
  gpu->prefill(id, std::span(tokens_).first(3), {});
  try {
    gpu->intervene(id, steered(config_, {0}));
    FAIL() << "expected an error";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::invalid_argument);
    EXPECT_NE(std::string(error.what()).find("interventions begin with a sequence"),
              std::string::npos)
        << error.what();
  }
}

std::vector<Shape> some_shapes() {
  std::vector<Shape> shapes;
  for (const Shape& shape : gpu_shapes())
    for (const char* name : {"tiny", "tiny_sequential", "tiny_bf16", "one_layer",
                             "pythia_160m_like", "pythia_2b8_like", "sequential"})
      if (shape.name == name) shapes.push_back(shape);
  return shapes;
}

INSTANTIATE_TEST_SUITE_P(Shapes, GpuInterventions, testing::ValuesIn(some_shapes()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace clusterfusion::test
