// A float32 KV cache on the GPU: prompts and decode steps against the float64 reference, where keys
// have large biases too, and against themselves bit for bit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "clusterfusion/error.hpp"
#include "gpu_fixture.hpp"
#include "support/large_bias_model.hpp"
#include "support/random_interventions.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion::test {
namespace {

// As for the other kinds of layers (family_test.cpp).
double tolerance(const ModelConfig& config) {
  return config.dtype == DType::float16 ? 2e-3 : 1.5e-2;
}

std::unique_ptr<Backend> on_gpu(const std::shared_ptr<const Model>& model,
                                std::optional<DType> kv_dtype = DType::float32,
                                DecodeMode mode = DecodeMode::latency) {
  BackendOptions options;
  options.kv_dtype = kv_dtype;
  options.mode = mode;
  return make_cuda_backend(model, options);
}

ModelConfig neox_config(std::int64_t head_dim, DType dtype) {
  const std::int64_t heads = 3;
  ModelConfig config =
      config_of({"neox", heads * head_dim, heads, 512, 2, 301, head_dim / 4 / 2 * 2});
  config.dtype = dtype;
  return config;
}

// Of Qwen2's form, which has biases of queries, keys and values.
ModelConfig qwen2_config(std::int64_t head_dim, DType dtype) {
  ModelConfig config = small_llama_config();
  config.model_type = "qwen2";
  config.attention_bias = true;
  config.qk_norm = false;
  config.hidden_size = 256;
  config.num_heads = 6;
  config.num_kv_heads = 2;
  config.head_dim = config.rotary_dim = head_dim;
  config.intermediate_size = 512;
  config.num_layers = 2;
  config.dtype = dtype;
  return config;
}

std::vector<ModelConfig> some_configs() {
  ModelConfig normed = qwen2_config(80, DType::float16);
  normed.model_type = "qwen3";
  normed.qk_norm = true;
  return {neox_config(64, DType::float16), neox_config(144, DType::bfloat16),
          qwen2_config(128, DType::bfloat16), normed};
}

std::string description(const ModelConfig& config) {
  return config.model_type + " " + name_of(config.dtype) + ", heads of " +
         std::to_string(config.head_dim);
}

class Float32Cache : public GpuTest {};

// Every size of a head. A decode step is a piece of one token.
TEST_F(Float32Cache, EqualsFloat64) {
  for (std::int64_t head_dim = 16; head_dim <= 256; head_dim += 16) {
    const DType dtype = head_dim / 16 % 2 == 0 ? DType::float16 : DType::bfloat16;
    for (const ModelConfig& config :
         {neox_config(head_dim, dtype), qwen2_config(head_dim, dtype)}) {
      SCOPED_TRACE(description(config));
      const auto model = make_random_model(config);
      const auto backend = on_gpu(model);
      const auto tokens = random_tokens(config.vocab_size, 100, 5);
      const auto found = all_logits(*backend, config.vocab_size, tokens);
      EXPECT_LE(relative_error(found, reference_logits(*model, tokens)), tolerance(config));
      EXPECT_EQ(decoded_logits(*backend, config.vocab_size, tokens), found);
    }
  }
}

// Both an end of a page and one of a tile of keys or queries lie between these numbers of tokens.
TEST_F(Float32Cache, EqualsFloat64AtAnyNumberOfTokens) {
  for (const ModelConfig& config : some_configs()) {
    SCOPED_TRACE(description(config));
    const auto width = static_cast<std::size_t>(config.vocab_size);
    const auto model = make_random_model(config);
    const auto backend = on_gpu(model);
    const auto tokens = random_tokens(config.vocab_size, 193, 6);
    const auto want = reference_logits(*model, tokens);
    for (const std::size_t count : {1, 2, 5, 16, 31, 32, 33, 63, 64, 65, 127, 128, 129, 193}) {
      const auto found = all_logits(*backend, config.vocab_size, std::span(tokens).first(count));
      EXPECT_LE(relative_error(found, std::span(want).first(count * width)), tolerance(config))
          << count << " tokens";
    }
  }
}

TEST_F(Float32Cache, HoldsLongContexts) {
  ModelConfig config = neox_config(64, DType::float16);
  config.num_layers = 1;
  const auto model = make_random_model(config);
  const auto backend = on_gpu(model);
  const auto width = static_cast<std::size_t>(config.vocab_size);
  const auto tokens = random_tokens(config.vocab_size, 1600, 7);
  const auto found = all_logits(*backend, config.vocab_size, tokens);
  EXPECT_LE(relative_error(found, reference_logits(*model, tokens)), tolerance(config));
  const SequenceId id = backend->create_sequence({});
  backend->prefill(id, std::span(tokens).first(tokens.size() - 1), {});
  std::vector<float> decoded(width);
  backend->decode(std::vector{id}, std::vector{tokens.back()}, 1, {}, decoded);
  EXPECT_TRUE(std::ranges::equal(decoded, std::span(found).last(width)));
}

// Keys of norm 300, and queries: 16 bits hold their differences badly, whatever the rest does.
TEST_F(Float32Cache, HoldsKeysOfLargeBiases) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    for (const ModelConfig& config : {neox_config(64, dtype), qwen2_config(64, dtype)}) {
      SCOPED_TRACE(description(config));
      const auto model = std::make_shared<LargeBiasModel>(make_random_model(config), 300.0);
      const auto tokens = random_tokens(config.vocab_size, 150, 8);
      const auto want = reference_logits(*model, tokens);
      const auto error_of = [&](std::optional<DType> kv_dtype) {
        const auto backend = on_gpu(model, kv_dtype);
        const double error = relative_error(all_logits(*backend, config.vocab_size, tokens), want);
        std::printf("%s, KV cache %s: relative error %.2e\n", description(config).c_str(),
                    name_of(backend->info().kv_dtype), error);
        return error;
      };
      EXPECT_LE(error_of(DType::float32), tolerance(config));
      EXPECT_GT(error_of(std::nullopt), 3 * tolerance(config)) << "the biases are too small";
    }
  }
}

TEST_F(Float32Cache, PiecesGiveTheBitsOfTheWhole) {
  std::mt19937 random(12);
  for (const ModelConfig& config : some_configs()) {
    SCOPED_TRACE(description(config));
    const auto backend = on_gpu(make_random_model(config));
    const auto width = static_cast<std::size_t>(config.vocab_size);
    const auto tokens = random_tokens(config.vocab_size, 400, 11);
    const auto whole = all_logits(*backend, config.vocab_size, tokens);
    for (const unsigned most : {3, 40, 250}) {
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
TEST_F(Float32Cache, CompanyDoesNotMatter) {
  std::mt19937 random(13);
  for (const ModelConfig& config : some_configs()) {
    SCOPED_TRACE(description(config));
    const auto backend = on_gpu(make_random_model(config), DType::float32, DecodeMode::throughput);
    expect_company_does_not_matter(*backend, config.vocab_size, 150, random);
  }
}

// The first page of a sequence goes to the host and to another backend; both go on from it, the
// first from within a page that it shares.
TEST_F(Float32Cache, GoesOnFromPagesThatAreSavedOrShared) {
  for (const ModelConfig& config : some_configs()) {
    SCOPED_TRACE(description(config));
    const auto model = make_random_model(config);
    const auto first = on_gpu(model);
    const auto second = on_gpu(model);
    const auto width = static_cast<std::size_t>(config.vocab_size);
    const auto tokens = random_tokens(config.vocab_size, 150, 3);
    const auto whole = all_logits(*first, config.vocab_size, tokens);
    const SequenceId id = first->create_sequence({});
    first->prefill(id, tokens, {});
    const KvPageId held = first->hold_page(id, 0);
    std::vector<std::byte> content(static_cast<std::size_t>(first->info().page_bytes()));
    first->read_page(held, content);

    const auto go_on = [&](Backend& backend, SequenceId sequence, std::size_t from) {
      std::vector<float> logits((tokens.size() - from) * width);
      PrefillOutput output;
      output.all_logits = logits;
      backend.prefill(sequence, std::span(tokens).subspan(from), output);
      EXPECT_TRUE(std::ranges::equal(logits, std::span(whole).subspan(from * width)));
    };
    const KvPageId page = second->add_page(content);
    const auto beginning = std::span(tokens).first(kKvPagePositions);
    go_on(*second, second->create_sequence({}, beginning, std::span(&page, 1), nullptr),
          kKvPagePositions);

    first->truncate(id, 37);
    const auto other = random_tokens(config.vocab_size, 27, 4);
    first->prefill(id, other, {});  // into a copy of the page
    std::vector<std::byte> afterwards(content.size());
    first->read_page(held, afterwards);
    EXPECT_EQ(afterwards, content);
    first->truncate(id, 37);
    go_on(*first, id, 37);
    first->drop_page(held);
  }
}

TEST_F(Float32Cache, InterventionsEqualTheCpus) {
  for (const ModelConfig& config : some_configs()) {
    SCOPED_TRACE(description(config));
    const auto model = make_random_model(config);
    const auto interventions = std::make_shared<Interventions>(*steered(config, {0, 1}));
    interventions->layers[0].ablated_heads = {0, 2};
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
    EXPECT_LE(relative_error(logits(*on_gpu(model)), logits(*make_cpu_backend(model, {}))),
              2 * tolerance(config));
  }
}

TEST_F(Float32Cache, SaysWhatItIs) {
  for (const ModelConfig& config : some_configs()) {
    const auto model = make_random_model(config);
    const auto usual = on_gpu(model, std::nullopt);
    EXPECT_EQ(usual->info().kv_dtype, config.dtype);
    for (const DecodeMode mode : {DecodeMode::latency, DecodeMode::throughput}) {
      const auto backend = on_gpu(model, DType::float32, mode);
      const BackendInfo& info = backend->info();
      EXPECT_EQ(info.kv_dtype, DType::float32);
      EXPECT_EQ(info.kv_bytes_per_position,
                2 * 4 * config.num_layers * config.kv_heads() * config.head_dim);
      EXPECT_EQ(info.kv_bytes_per_position, 2 * usual->info().kv_bytes_per_position);
      EXPECT_THAT(info.device, ::testing::HasSubstr("layer by layer (a float32 KV cache)"));
    }
  }
}

TEST_F(Float32Cache, TheOther16BitTypeIsRefused) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    const DType other = dtype == DType::float16 ? DType::bfloat16 : DType::float16;
    const auto model = make_random_model(neox_config(64, dtype));
    EXPECT_EQ(on_gpu(model, dtype)->info().kv_dtype, dtype);
    try {
      on_gpu(model, other);
      FAIL() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::unsupported);
      EXPECT_THAT(error.what(),
                  ::testing::HasSubstr(std::string("kv_dtype ") + name_of(other) +
                                       " is not available on the GPU for this model: its KV "
                                       "cache has the weights' type, " +
                                       name_of(dtype) + ", or float32; leave kv_dtype out"));
    }
  }
}

}  // namespace
}  // namespace clusterfusion::test
