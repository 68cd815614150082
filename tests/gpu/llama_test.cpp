// Llama, Mistral, Qwen2 and Qwen3 on the GPU: random models of each against the float64 reference,
// against the CPU backend where the rotation is scaled, and against themselves bit for bit.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "gpu_fixture.hpp"
#include "support/gathered_model.hpp"
#include "support/random_interventions.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion::test {
namespace {

// What tells the families' layers apart.
struct Kind {
  const char* name;
  bool qkv_bias, qk_norm;
};
constexpr Kind kKinds[] = {{"llama", false, false},
                           {"mistral", false, false},
                           {"qwen2", true, false},
                           {"qwen3", false, true}};

ModelConfig llama_config(const Kind& kind) {
  ModelConfig config = small_llama_config();
  config.model_type = kind.name;
  config.attention_bias = kind.qkv_bias;
  config.qk_norm = kind.qk_norm;
  config.hidden_size = 256;
  config.num_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = config.rotary_dim = 64;
  config.intermediate_size = 512;
  config.num_layers = 2;
  config.max_positions = 2048;
  config.dtype = DType::float16;
  return config;
}

// Sizes that a GPU computes, heads as wide as the hidden size among them and apart from it.
ModelConfig random_config(const Kind& kind, DType dtype, std::mt19937& random) {
  const auto below = [&](unsigned end) { return static_cast<std::int64_t>(random() % end); };
  ModelConfig config = llama_config(kind);
  config.dtype = dtype;
  config.head_dim = config.rotary_dim = 16 * (1 + below(16));
  config.num_kv_heads = 1 + below(4);
  config.num_heads = config.num_kv_heads * (1 + below(5));
  config.hidden_size = below(2) == 0 ? config.attention_size() : 8 * (8 + below(80));
  config.intermediate_size = 8 * (8 + below(80));
  config.layer_norm_eps = below(2) == 0 ? 1e-5 : 1e-6;
  config.rope_theta = below(2) == 0 ? 10000.0 : 1e6;
  config.tied_embeddings = below(2) == 0;
  return config;
}

std::string description(const ModelConfig& config) {
  return config.model_type + " " + name_of(config.dtype) + ", hidden size " +
         std::to_string(config.hidden_size) + ", " + std::to_string(config.num_heads) +
         " heads over " + std::to_string(config.num_kv_heads) + " of " +
         std::to_string(config.head_dim) + ", MLP " + std::to_string(config.intermediate_size);
}

// As for the other kinds of layers (family_test.cpp).
double tolerance(const ModelConfig& config) {
  return config.dtype == DType::float16 ? 2e-3 : 1.5e-2;
}

std::unique_ptr<Backend> on_gpu(const std::shared_ptr<const Model>& model,
                                DecodeMode mode = DecodeMode::latency) {
  BackendOptions options;
  options.mode = mode;
  return make_cuda_backend(model, options);
}

bool streams(const Backend& backend) {
  return backend.info().device.find("layer by layer") == std::string::npos;
}

// In both modes: by the streaming kernel, where it takes the sizes, and layer by layer.
void expect_float64(const ModelConfig& config, int count) {
  SCOPED_TRACE(description(config));
  const auto model = make_random_model(config);
  const auto tokens = random_tokens(config.vocab_size, count, 5);
  const std::vector<double> want = reference_logits(*model, tokens);
  const auto by_layers = on_gpu(model, DecodeMode::throughput);
  ASSERT_FALSE(streams(*by_layers));
  const auto found = all_logits(*by_layers, config.vocab_size, tokens);
  EXPECT_LE(relative_error(found, want), tolerance(config));
  // A decode step is a piece of one token.
  EXPECT_EQ(decoded_logits(*by_layers, config.vocab_size, tokens), found);
  const auto backend = on_gpu(model);
  EXPECT_EQ(all_logits(*backend, config.vocab_size, tokens), found);
  const auto decoded = decoded_logits(*backend, config.vocab_size, tokens);
  EXPECT_LE(relative_error(decoded, want), tolerance(config)) << backend->info().device;
  EXPECT_EQ(decoded_logits(*backend, config.vocab_size, tokens), decoded) << "run to run";
}

class LlamaTest : public GpuTest {};

TEST_F(LlamaTest, EqualsFloat64AtRandomSizes) {
  std::mt19937 random(1);
  for (const Kind& kind : kKinds) {
    for (const DType dtype : {DType::float16, DType::bfloat16}) {
      for (int round = 0; round < 4; ++round)
        expect_float64(random_config(kind, dtype, random), 100);
    }
  }
}

// Sizes that the streaming kernel takes: any group of heads, packed operands and not, rows whose
// last slices are shorter, one chunk of a gated MLP's matrices shorter than the others.
TEST_F(LlamaTest, StreamsRandomSizes) {
  std::mt19937 random(2);
  const auto one_of = [&](std::initializer_list<std::int64_t> values) {
    return values.begin()[random() % values.size()];
  };
  for (const Kind& kind : kKinds) {
    for (const DType dtype : {DType::float16, DType::bfloat16}) {
      for (int round = 0; round < 6;) {
        ModelConfig config = random_config(kind, dtype, random);
        config.head_dim = config.rotary_dim = one_of({16, 32, 64, 80, 96, 128, 256});
        config.num_kv_heads = one_of({1, 2, 4});
        config.num_heads = config.num_kv_heads * static_cast<std::int64_t>(1 + round);
        config.rotary_dim = config.head_dim;
        config.hidden_size = one_of({96, 256, 320, 456, 576, 896, 1024, 2048});
        config.intermediate_size = one_of({160, 200, 576, 1024, 1536, 3072, 4864, 5632, 8192});
        if (!plan::unstreamed_because(config, {132, 227 * 1024}).empty()) continue;
        expect_float64(config, 70);
        ++round;
      }
    }
  }
}

// MLPs so wide that a row comes in two stages: the second as long as the first, and shorter; with
// rows of other matrices that chunks have two or four of, and with biases.
TEST_F(LlamaTest, StreamsWideRowsInTwoStages) {
  int round = 0;
  for (const std::int64_t intermediate : {10296, 11008, 12288, 14336, 16384, 18944, 20480}) {
    for (const std::int64_t hidden : {512, 3072, 4096}) {
      ModelConfig config = llama_config(kKinds[round % 4]);
      config.hidden_size = hidden;
      config.intermediate_size = intermediate;
      config.dtype = round % 2 == 0 ? DType::float16 : DType::bfloat16;
      config.gated_mlp = round % 3 != 0;
      config.mlp_bias = !config.gated_mlp;
      config.parallel_residual = round % 5 == 0;
      config.num_layers = 1;
      ASSERT_EQ(plan::unstreamed_because(config, {132, 227 * 1024}), "");
      expect_float64(config, 8);
      ++round;
    }
  }
}

// Several splits of a head, and blocks of keys and values in several pages.
TEST_F(LlamaTest, StreamsLongContexts) {
  for (const std::int64_t head_dim : {64, 128}) {
    ModelConfig config = llama_config(kKinds[0]);
    config.head_dim = config.rotary_dim = head_dim;
    config.num_heads = 8;
    SCOPED_TRACE(description(config));
    const auto model = make_random_model(config);
    const auto backend = on_gpu(model);
    ASSERT_TRUE(streams(*backend)) << backend->info().device;
    constexpr int kPrompt = 1500, kDecoded = 70;
    const auto tokens = random_tokens(config.vocab_size, kPrompt + kDecoded, 21);
    const std::vector<double> want = reference_logits(*model, tokens);
    const auto width = static_cast<std::size_t>(config.vocab_size);
    std::vector<float> found(kDecoded * width);
    const SequenceId id = backend->create_sequence({});
    backend->prefill(id, std::span(tokens).first(kPrompt), {});
    for (std::size_t i = 0; i < kDecoded; ++i)
      backend->decode(std::vector{id}, std::span(tokens).subspan(kPrompt + i, 1), 1, {},
                      std::span(found).subspan(i * width, width));
    EXPECT_LE(relative_error(found, std::span(want).last(kDecoded * width)), tolerance(config));
  }
}

// Several steps in a launch, each from the token of the one before: what single steps choose.
TEST_F(LlamaTest, StreamsSeveralStepsInALaunch) {
  for (const Kind& kind : kKinds) {
    const auto model = make_random_model(llama_config(kind));
    const auto backend = on_gpu(model);
    ASSERT_TRUE(streams(*backend)) << backend->info().device;
    for (const float temperature : {0.0f, 0.9f}) {
      const auto tokens_in = [&](std::int32_t steps) {
        const SequenceId id = backend->create_sequence({.temperature = temperature, .seed = 4});
        backend->prefill(id, random_tokens(model->config().vocab_size, 30, 3), {});
        std::vector<TokenId> tokens = {7};
        while (tokens.size() < 32) {
          std::vector<SampledToken> sampled(static_cast<std::size_t>(steps));
          backend->decode(std::vector{id}, std::vector{tokens.back()}, steps, sampled, {});
          for (const SampledToken& token : sampled) tokens.push_back(token.token);
        }
        tokens.resize(32);
        return tokens;
      };
      const auto single = tokens_in(1);
      EXPECT_EQ(tokens_in(16), single);
      EXPECT_EQ(tokens_in(5), single);
    }
  }
}

// Every bias beside each of the options that stand in the way of another.
TEST_F(LlamaTest, EqualsFloat64WithEveryOption) {
  for (int bits = 0; bits < 32; ++bits) {
    ModelConfig config = llama_config(kKinds[0]);
    config.qk_norm = (bits & 1) != 0;
    config.attention_bias = (bits & 2) != 0;
    config.attention_out_bias = (bits & 4) != 0;
    config.mlp_bias = (bits & 8) != 0;
    config.qkv_layout = (bits & 16) != 0 ? QkvLayout::by_kv_head : QkvLayout::separate;
    expect_float64(config, 30);
  }
}

// One layer of each, with a small vocabulary.
TEST_F(LlamaTest, EqualsFloat64AtTheSizesOfKnownModels) {
  struct Sizes {
    const Kind& kind;
    std::int64_t hidden, heads, kv_heads, head_dim, intermediate;
  };
  for (const Sizes& sizes : {Sizes{kKinds[0], 2048, 32, 8, 64, 8192},    // Llama-3.2-1B
                             Sizes{kKinds[1], 4096, 32, 8, 128, 14336},  // Mistral-7B, Llama-3.1-8B
                             Sizes{kKinds[2], 896, 14, 2, 64, 4864},     // Qwen2.5-0.5B
                             Sizes{kKinds[3], 1024, 16, 8, 128, 3072}}) {  // Qwen3-0.6B
    ModelConfig config = llama_config(sizes.kind);
    config.hidden_size = sizes.hidden;
    config.num_heads = sizes.heads;
    config.num_kv_heads = sizes.kv_heads;
    config.head_dim = config.rotary_dim = sizes.head_dim;
    config.intermediate_size = sizes.intermediate;
    config.num_layers = 1;
    config.vocab_size = 5003;
    config.dtype = DType::bfloat16;
    expect_float64(config, 40);
  }
}

TEST_F(LlamaTest, EqualsFloat64WithALargeTiedVocabulary) {
  ModelConfig config = llama_config(kKinds[3]);
  config.vocab_size = 151936;
  config.tied_embeddings = true;
  expect_float64(config, 6);
}

// Up to the last position of the context, whose table has as many.
TEST_F(LlamaTest, ScalesRotationsAsTheCpuDoes) {
  constexpr int kTokens = 300;
  ModelConfig config = llama_config(kKinds[0]);
  BackendOptions options;
  options.max_positions = kTokens;
  const auto tokens = random_tokens(config.vocab_size, kTokens, 7);
  const auto logits = [&](const std::unique_ptr<Backend>& backend) {
    return all_logits(*backend, config.vocab_size, tokens);
  };
  const auto plain = logits(make_cpu_backend(make_random_model(config), {}));
  for (const RopeKind kind : {RopeKind::linear, RopeKind::llama3, RopeKind::yarn}) {
    SCOPED_TRACE(name_of(kind));
    config.rope_scaling = {.kind = kind, .factor = 8, .original_positions = 40};
    if (kind == RopeKind::yarn) config.rope_scaling.attention_factor = 1.2;
    const auto model = make_random_model(config);
    const auto want = logits(make_cpu_backend(model, {}));
    EXPECT_LE(relative_error(logits(make_cuda_backend(model, options)), want),
              2 * tolerance(config));
    EXPECT_GT(relative_error(plain, want), 8 * tolerance(config)) << "changes too little";
  }
}

TEST_F(LlamaTest, PiecesGiveTheBitsOfTheWhole) {
  std::mt19937 random(12);
  for (const Kind& kind : kKinds) {
    const ModelConfig config = random_config(kind, DType::bfloat16, random);
    SCOPED_TRACE(description(config));
    const auto backend = on_gpu(make_random_model(config));
    const auto width = static_cast<std::size_t>(config.vocab_size);
    const auto tokens = random_tokens(config.vocab_size, 400, 11);
    const auto whole = all_logits(*backend, config.vocab_size, tokens);
    for (const unsigned most : {40, 250}) {
      std::vector<float> logits(whole.size());
      const SequenceId id = backend->create_sequence({});
      for (std::size_t done = 0; done < tokens.size();) {
        const std::size_t count = std::min<std::size_t>(1 + random() % most, tokens.size() - done);
        PrefillOutput output;
        output.all_logits = std::span(logits).subspan(done * width, count * width);
        backend->prefill(id, std::span(tokens).subspan(done, count), output);
        done += count;
      }
      backend->release_sequence(id);
      ASSERT_EQ(logits, whole) << "pieces of up to " << most;
    }
  }
}

// Prompts of one pass, and rows of one decode step.
TEST_F(LlamaTest, CompanyDoesNotMatter) {
  std::mt19937 random(13);
  for (const Kind& kind : kKinds) {
    const ModelConfig config = random_config(kind, DType::float16, random);
    SCOPED_TRACE(description(config));
    const auto backend = on_gpu(make_random_model(config), DecodeMode::throughput);
    expect_company_does_not_matter(*backend, config.vocab_size, 100, random);
  }
}

// Where the matrices come from is no matter of arithmetic.
TEST_F(LlamaTest, AMatrixGatheredBeforeGivesTheSameBits) {
  std::mt19937 random(14);
  for (const Kind& kind : kKinds) {
    const ModelConfig config = random_config(kind, DType::float16, random);
    SCOPED_TRACE(description(config));
    const auto model = make_random_model(config);
    const auto gathered = std::make_shared<GatheredModel>(model);
    const auto tokens = random_tokens(config.vocab_size, 70, 3);
    EXPECT_EQ(all_logits(*on_gpu(model), config.vocab_size, tokens),
              all_logits(*on_gpu(gathered), config.vocab_size, tokens));
  }
}

TEST_F(LlamaTest, InterventionsEqualTheCpus) {
  for (const Kind& kind : kKinds) {
    const ModelConfig config = llama_config(kind);
    SCOPED_TRACE(description(config));
    const auto model = make_random_model(config);
    const auto interventions = std::make_shared<Interventions>(*steered(config, {0, 1}));
    interventions->layers[0].ablated_heads = {1, 4};
    interventions->layers[1].ablates_mlp = true;
    const auto tokens = random_tokens(config.vocab_size, 40, 8);
    const auto logits = [&](Backend& backend) {
      const std::size_t prompt = 20;
      const auto width = static_cast<std::size_t>(config.vocab_size);
      std::vector<float> all(tokens.size() * width);
      const SequenceId id = backend.create_sequence({});
      backend.intervene(id, interventions);
      PrefillOutput output;
      output.all_logits = std::span(all).first(prompt * width);
      backend.prefill(id, std::span(tokens).first(prompt), output);
      for (std::size_t i = prompt; i < tokens.size(); ++i)
        backend.decode(std::vector{id}, std::span(tokens).subspan(i, 1), 1, {},
                       std::span(all).subspan(i * width, width));
      return all;
    };
    const auto want = logits(*make_cpu_backend(model, {}));
    for (const DecodeMode mode : {DecodeMode::latency, DecodeMode::throughput})
      EXPECT_LE(relative_error(logits(*on_gpu(model, mode)), want), 2 * tolerance(config));
  }
}

TEST_F(LlamaTest, SaysHowItDecodes) {
  ModelConfig config = llama_config(kKinds[0]);
  const auto device_in = [&](DecodeMode mode) {
    return on_gpu(make_random_model(config), mode)->info().device;
  };
  EXPECT_THAT(device_in(DecodeMode::throughput),
              ::testing::HasSubstr("layer by layer (grouped heads)"));
  EXPECT_THAT(device_in(DecodeMode::latency), ::testing::Not(::testing::HasSubstr("layer by")));
  config.mlp_bias = true;
  EXPECT_THAT(device_in(DecodeMode::latency),
              ::testing::HasSubstr("layer by layer (biases of a gated MLP)"));
}

}  // namespace
}  // namespace clusterfusion::test
