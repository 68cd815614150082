// Prefill as matrix-matrix work against the float64 reference, and against itself bit for bit. The
// KV pages lie in shuffled order and are full of NaN before they are written.
#include "backend/cuda/prefill/prefill.hpp"

#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend/cuda/captured_graph.hpp"
#include "backend/cuda/check.hpp"
#include "backend/cuda/device_model.hpp"
#include "backend/cuda/prefill/row_kernels.hpp"
#include "clusterfusion/error.hpp"
#include "gpu_fixture.hpp"
#include "sampling/sampler.hpp"
#include "support/reference_model.hpp"

namespace clusterfusion::test {
namespace {

// Token 0 is left out: a test poisons it.
std::vector<TokenId> tokens_without_0(std::int64_t vocab, int count, unsigned seed) {
  auto tokens = random_tokens(vocab - 1, count, seed);
  for (TokenId& token : tokens) ++token;
  return tokens;
}

double relative_error(std::span<const float> found, std::span<const double> expected) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);  // NaN fails every comparison
}

// The order of what 16-bit PyTorch gets on models of this kind.
double tolerance(DType dtype) { return dtype == DType::float16 ? 1e-3 : 8e-3; }

// One sequence, prefilled without a backend.
class Prompter {
 public:
  explicit Prompter(const Model& model, unsigned seed = 1, bool float32_kv = false)
      : config_(model.config()),
        kv_(float32_kv ? plan::make_page_plan(config_, DType::float32) : kv_plan_of(config_)),
        weights_(model, {config_.max_positions, kv_.page_bytes}),
        prefill_(config_, weights_, kv_, config_.max_positions, 64 << 20),
        slab_(kv_.page_bytes * kPages, "pages"),
        pages_(kPages) {
    poison_pages();
    for (std::int64_t i = 0; i < kPages; ++i) pages_[i] = slab_.as<>() + i * kv_.page_bytes;
    std::shuffle(pages_.begin(), pages_.end(), std::mt19937(seed));
  }

  std::int64_t max_tokens() const { return prefill_.max_tokens(); }
  std::int64_t num_graphs() const { return prefill_.num_graphs(); }

  void run(std::span<const TokenId> tokens, std::int64_t first, const PrefillOutput& output) {
    const cuda::PromptPiece piece{tokens, first, pages_, nullptr, &output};
    prefill_.run({&piece, 1}, nullptr);
  }

  // Logits at every position, in pieces that end at `cuts` and at the end.
  std::vector<float> all_logits(std::span<const TokenId> tokens, std::vector<std::size_t> cuts) {
    const auto vocab = static_cast<std::size_t>(config_.vocab_size);
    std::vector<float> logits(tokens.size() * vocab, std::numeric_limits<float>::quiet_NaN());
    cuts.push_back(tokens.size());
    std::size_t begin = 0;
    for (const std::size_t end : cuts) {
      PrefillOutput output;
      output.all_logits = std::span(logits).subspan(begin * vocab, (end - begin) * vocab);
      run(tokens.subspan(begin, end - begin), static_cast<std::int64_t>(begin), output);
      begin = end;
    }
    return logits;
  }

  void poison_pages() {
    cuda::check(cudaMemset(slab_.as<>(), 0xff, static_cast<std::size_t>(slab_.bytes())),
                "poisoning pages");
  }

  // Numbers in the pages that are not what poison_pages() left.
  std::int64_t count_written() const {
    return kv_.dtype == DType::float32 ? count_written_as<std::uint32_t>()
                                       : count_written_as<std::uint16_t>();
  }

  void poison_embedding_of_token_0() {
    cuda::check(cudaMemset(const_cast<char*>(weights_.embedding()), 0xff,
                           static_cast<std::size_t>(config_.hidden_size * 2)),
                "poisoning an embedding");
  }

 private:
  template <typename Bits>
  std::int64_t count_written_as() const {
    std::vector<Bits> numbers(static_cast<std::size_t>(slab_.bytes()) / sizeof(Bits));
    cuda::check(cudaMemcpy(numbers.data(), slab_.as<>(), numbers.size() * sizeof(Bits),
                           cudaMemcpyDeviceToHost),
                "fetching pages");
    return std::count_if(numbers.begin(), numbers.end(),
                         [](Bits number) { return number != static_cast<Bits>(-1); });
  }

  static constexpr std::int64_t kPages = 40;
  const ModelConfig& config_;
  plan::KvPlan kv_;
  cuda::DeviceModel weights_;
  cuda::Prefill prefill_;
  cuda::DeviceMemory slab_;
  std::vector<char*> pages_;
};

Shape float32_kv(Shape shape) {
  shape.float32_kv = true;
  return shape;
}

class PrefillShapes : public GpuTest, public testing::WithParamInterface<Shape> {
 protected:
  // Whoever is of another `seed` has the pages in another order.
  static Prompter prompter_of(const Model& model, unsigned seed = 1) {
    return Prompter(model, seed, GetParam().float32_kv);
  }
};

TEST_P(PrefillShapes, MatchesFloat64ForAnyNumberOfTokens) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto tokens = tokens_without_0(config.vocab_size, 200, 7);
  const auto expected = reference_logits(*model, tokens);
  Prompter prompter = prompter_of(*model);
  double worst = 0;
  for (const std::size_t count : {1, 2, 15, 63, 64, 65, 127, 200}) {
    const auto found = prompter.all_logits(std::span(tokens).first(count), {});
    const double error = relative_error(
        found, std::span(expected).first(count * static_cast<std::size_t>(config.vocab_size)));
    worst = std::max(worst, error);
    EXPECT_LT(error, tolerance(config.dtype)) << count << " tokens";
  }
  std::printf("%-20s relative error at most %.2e\n", GetParam().name.c_str(), worst);
  RecordProperty("relative_error", std::to_string(worst));
}

TEST_P(PrefillShapes, PiecesMatchFloat64) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto tokens = tokens_without_0(config.vocab_size, 160, 8);
  const auto expected = reference_logits(*model, tokens);
  const std::vector<std::vector<std::size_t>> partitions = {
      {1, 2, 3}, {63, 64, 65}, {100}, {7, 71, 130}};
  for (const auto& cuts : partitions) {
    Prompter prompter = prompter_of(*model, static_cast<unsigned>(cuts.front()));
    EXPECT_LT(relative_error(prompter.all_logits(tokens, cuts), expected), tolerance(config.dtype))
        << "first cut at " << cuts.front();
  }
}

TEST_P(PrefillShapes, SameBitsEveryTimeWhateverWasInMemory) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto tokens = tokens_without_0(config.vocab_size, 150, 9);
  Prompter fresh = prompter_of(*model);
  const auto first = fresh.all_logits(tokens, {90});
  ASSERT_EQ(fresh.all_logits(tokens, {90}), first);
  // A prompt of NaN fills pages and workspace with NaN.
  Prompter poisoned = prompter_of(*model, 2);
  poisoned.poison_embedding_of_token_0();
  const std::vector<TokenId> poison(300, 0);
  std::vector<float> logits(config.vocab_size);
  PrefillOutput output;
  output.last_logits = logits;
  EXPECT_THAT([&] { poisoned.run(poison, 0, output); },
              testing::ThrowsMessage<Error>(
                  testing::HasSubstr("the logits after position 299 are not finite")));
  EXPECT_TRUE(std::isnan(logits[0]));
  // Launch by launch, captured, and as the graph.
  for (int round = 0; round < 3; ++round) {
    if (round == 2) poisoned.poison_pages();
    ASSERT_EQ(poisoned.all_logits(tokens, {90}), first) << "round " << round;
  }
}

// Prompts of different lengths that share numbers of rows, whole and in pieces. The pieces of one
// have different numbers of rows, so that a fresh Prompter runs each of them launch by launch.
struct PiecedPrompt {
  int count;
  std::vector<std::size_t> cuts;
};

const std::vector<PiecedPrompt>& pieced_prompts() {
  static const std::vector<PiecedPrompt> prompts = {
      {128, {}},              // 128 rows
      {160, {50, 150}},       // 64, 128 and 16
      {159, {64, 129}},       // 64, 128 and 32
      {210, {49, 177, 193}},  // 64, 128, 16 and 32
      {65, {}},               // 128
      {1, {}},                // 16
      {127, {17}},            // 32 and 128
      {500, {300}},           // 320 and 256
      {513, {}},              // 576: never a graph
  };
  return prompts;
}

constexpr std::int64_t kGraphsOfPiecedPrompts = 6;

TEST_P(PrefillShapes, GraphsGiveTheBitsOfSingleLaunches) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto tokens_of = [&](std::size_t i) {
    return tokens_without_0(config.vocab_size, pieced_prompts()[i].count,
                            static_cast<unsigned>(20 + i));
  };
  std::vector<std::vector<float>> expected;
  for (std::size_t i = 0; i < pieced_prompts().size(); ++i) {
    Prompter fresh = prompter_of(*model, static_cast<unsigned>(i + 1));
    expected.push_back(fresh.all_logits(tokens_of(i), pieced_prompts()[i].cuts));
    ASSERT_EQ(fresh.num_graphs(), 0) << "prompt " << i;
  }
  Prompter prompter = prompter_of(*model, 99);
  std::mt19937 random(5);
  std::vector<std::size_t> order(pieced_prompts().size());
  std::iota(order.begin(), order.end(), 0);
  for (int round = 0; round < 4; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    for (const std::size_t i : order) {
      prompter.poison_pages();
      ASSERT_EQ(prompter.all_logits(tokens_of(i), pieced_prompts()[i].cuts), expected[i])
          << "prompt " << i << ", round " << round;
    }
  }
  EXPECT_EQ(prompter.num_graphs(), kGraphsOfPiecedPrompts);
}

// Launch by launch, captured, and as the graph: the rows behind a prompt leave the pages alone.
TEST_P(PrefillShapes, PaddingHasNoKeysAndValues) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto tokens = tokens_without_0(config.vocab_size, 105, 41);
  const std::int64_t of_one_token = config.num_layers * 2 * config.hidden_size;
  Prompter prompter = prompter_of(*model);
  for (int round = 0; round < 3; ++round) {
    prompter.poison_pages();
    prompter.run(std::span(tokens).first(33), 0, {});
    EXPECT_EQ(prompter.count_written(), 33 * of_one_token) << "round " << round;
    prompter.run(std::span(tokens).subspan(33), 33, {});
    EXPECT_EQ(prompter.count_written(), 105 * of_one_token) << "round " << round;
  }
}

TEST_P(PrefillShapes, PiecesGiveTheBitsOfTheWhole) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto tokens = tokens_without_0(config.vocab_size, 400, 11);
  Prompter prompter = prompter_of(*model);
  const auto whole = prompter.all_logits(tokens, {});
  std::mt19937 random(12);
  for (int round = 0; round < 6; ++round) {
    std::vector<std::size_t> cuts;
    for (std::size_t cut = 0; (cut += 1 + random() % (round < 3 ? 40 : 250)) < tokens.size();)
      cuts.push_back(cut);
    prompter.poison_pages();
    ASSERT_EQ(prompter.all_logits(tokens, cuts), whole) << "round " << round;
  }
}

// Sequences that go on, and new ones, in passes together, as often as it takes.
TEST_P(PrefillShapes, CompanyDoesNotMatter) {
  const ModelConfig config = config_of(GetParam());
  const auto model = make_random_model(config);
  const auto vocab = static_cast<std::size_t>(config.vocab_size);
  BackendOptions options;
  if (GetParam().float32_kv) options.kv_dtype = DType::float32;
  const auto backend = make_cuda_backend(model, options);
  struct Text {
    std::vector<TokenId> tokens;
    std::vector<float> alone, found;
    SequenceId id = -1;
    std::size_t done = 0;
  };
  std::mt19937 random(13);
  std::vector<Text> texts(12);
  for (std::size_t i = 0; i < texts.size(); ++i) {
    Text& text = texts[i];
    text.tokens = tokens_without_0(config.vocab_size, static_cast<int>(1 + random() % 250),
                                   static_cast<unsigned>(50 + i));
    text.alone.resize(text.tokens.size() * vocab);
    text.found.resize(text.alone.size());
    PrefillOutput output;
    output.all_logits = text.alone;
    const SequenceId id = backend->create_sequence({});
    backend->prefill(id, text.tokens, output);
    backend->release_sequence(id);
    text.id = backend->create_sequence({});
  }
  for (bool going = true; going;) {
    going = false;
    std::vector<PrefillPart> parts;
    for (Text& text : texts) {
      const std::size_t left = text.tokens.size() - text.done;
      going |= left > 0;
      if (left == 0 || random() % 3 == 0) continue;
      const std::size_t count = std::min<std::size_t>(left, 1 + random() % 130);
      PrefillPart& part =
          parts.emplace_back(text.id, std::span(text.tokens).subspan(text.done, count));
      part.output.all_logits = std::span(text.found).subspan(text.done * vocab, count * vocab);
      text.done += count;
    }
    if (!parts.empty()) backend->prefill_together(parts);
  }
  for (std::size_t i = 0; i < texts.size(); ++i) ASSERT_EQ(texts[i].found, texts[i].alone) << i;
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, PrefillShapes,
    testing::Values(
        Shape{"head_16", 128, 8, 512, 2, 301, 4}, Shape{"head_32", 128, 4, 512, 2, 301, 8},
        Shape{"head_48", 192, 4, 576, 2, 301, 2}, Shape{"head_64", 256, 4, 1024, 2, 301, 64},
        Shape{"head_80", 320, 4, 1280, 2, 301, 20}, Shape{"head_96", 192, 2, 96, 2, 301, 24},
        Shape{"head_128", 256, 2, 1024, 2, 301, 32}, Shape{"head_144", 288, 2, 1152, 2, 301, 36},
        Shape{"head_256", 512, 2, 2048, 2, 301, 64}, Shape{"no_rotation", 128, 4, 512, 2, 301, 0},
        Shape{"head_80_bf16", 320, 4, 1280, 2, 301, 20, true, Activation::gelu_erf,
              DType::bfloat16},
        Shape{"head_256_bf16", 512, 2, 2048, 2, 301, 64, true, Activation::gelu_erf,
              DType::bfloat16},
        Shape{"sequential", 256, 4, 1024, 2, 301, 16, false},
        Shape{"sequential_bf16", 256, 2, 1024, 2, 301, 32, false, Activation::gelu_tanh,
              DType::bfloat16},
        Shape{"gelu_tanh", 128, 4, 512, 2, 301, 8, true, Activation::gelu_tanh},
        Shape{"gelu_quick", 128, 4, 512, 2, 301, 8, true, Activation::gelu_quick},
        Shape{"relu", 128, 4, 512, 2, 301, 8, true, Activation::relu},
        Shape{"relu_squared", 128, 4, 512, 2, 301, 8, false, Activation::relu_squared},
        Shape{"silu", 128, 4, 512, 2, 301, 8, true, Activation::silu},
        Shape{"mish", 128, 4, 512, 2, 301, 8, true, Activation::mish},
        Shape{"tanh", 128, 4, 512, 2, 301, 8, false, Activation::tanh},
        Shape{"sigmoid", 128, 4, 512, 2, 301, 8, true, Activation::sigmoid},
        Shape{"identity", 128, 4, 512, 2, 301, 8, true, Activation::identity},
        float32_kv({"head_16_float32_kv", 128, 8, 512, 2, 301, 4}),
        float32_kv({"head_80_float32_kv", 320, 4, 1280, 2, 301, 20}),
        float32_kv({"head_256_float32_kv", 512, 2, 2048, 2, 301, 64}),
        float32_kv({"no_rotation_float32_kv", 128, 4, 512, 2, 301, 0}),
        float32_kv({"sequential_bf16_float32_kv", 256, 2, 1024, 2, 301, 32, false,
                    Activation::gelu_tanh, DType::bfloat16})),
    [](const auto& info) { return info.param.name; });

class PrefillTest : public GpuTest {};

const Shape kShape{"head_80", 320, 4, 1280, 2, 301, 20};

TEST_F(PrefillTest, WithoutAttentionBiasAndWithATiedHead) {
  ModelConfig config = config_of(kShape);
  config.attention_bias = false;
  config.tied_embeddings = true;
  const auto model = make_random_model(config);
  const auto tokens = tokens_without_0(config.vocab_size, 90, 16);
  EXPECT_LT(
      relative_error(Prompter(*model).all_logits(tokens, {}), reference_logits(*model, tokens)),
      tolerance(config.dtype));
}

TEST_F(PrefillTest, LongPromptMatchesFloat64) {
  const ModelConfig config = config_of({"long", 160, 2, 640, 1, 301, 20});
  const auto model = make_random_model(config);
  const auto backend = make_cuda_backend(model, {});
  const auto tokens = tokens_without_0(config.vocab_size, 2300, 10);
  std::vector<float> logits(tokens.size() * static_cast<std::size_t>(config.vocab_size));
  PrefillOutput output;
  output.all_logits = logits;
  backend->prefill(backend->create_sequence({}), tokens, output);
  EXPECT_LT(relative_error(logits, reference_logits(*model, tokens)), tolerance(config.dtype));
}

TEST_F(PrefillTest, LogProbabilitiesOfTargets) {
  const ModelConfig config = config_of(kShape);
  const auto model = make_random_model(config);
  const auto tokens = tokens_without_0(config.vocab_size, 100, 11);
  const auto expected = reference_logits(*model, tokens);
  auto targets = random_tokens(config.vocab_size, 100, 12);
  constexpr float kUntouched = 123.0f;
  for (const std::size_t row : {0, 1, 40, 98}) targets[row] = -1;
  std::vector<float> logprobs(targets.size(), kUntouched);
  PrefillOutput output;
  output.targets = targets;
  output.target_logprobs = logprobs;
  Prompter(*model).run(tokens, 0, output);
  for (std::size_t row = 0; row < targets.size(); ++row) {
    if (targets[row] < 0) {
      EXPECT_EQ(logprobs[row], kUntouched) << row;
      continue;
    }
    const auto width = static_cast<std::size_t>(config.vocab_size);
    const auto logits = std::span(expected).subspan(row * width, width);
    double sum = 0;
    for (const double logit : logits) sum += std::exp(logit);
    EXPECT_NEAR(logprobs[row], logits[targets[row]] - std::log(sum), 0.02) << row;
  }
}

TEST_F(PrefillTest, TellsWhichTargetsAreTheLikeliest) {
  const ModelConfig config = config_of(kShape);
  const auto backend = make_cuda_backend(make_random_model(config), {});
  const auto tokens = tokens_without_0(config.vocab_size, 100, 11);
  const auto width = static_cast<std::size_t>(config.vocab_size);
  std::vector<float> logits(tokens.size() * width);
  PrefillOutput all;
  all.all_logits = logits;
  backend->prefill(backend->create_sequence({}), tokens, all);
  const auto likeliest = [&](std::size_t row) {
    return likeliest_token(std::span<const float>(logits).subspan(row * width, width));
  };
  auto targets = random_tokens(config.vocab_size, 100, 12);
  for (std::size_t row = 0; row < targets.size(); row += 2) targets[row] = likeliest(row);
  targets[7] = -1;
  std::vector<float> logprobs(targets.size());
  std::vector<std::uint8_t> is_likeliest(targets.size(), 2);
  PrefillOutput output;
  output.targets = targets;
  output.target_logprobs = logprobs;
  output.target_is_likeliest = is_likeliest;
  backend->prefill(backend->create_sequence({}), tokens, output);
  for (std::size_t row = 0; row < targets.size(); ++row) {
    const int expected = targets[row] < 0 ? 2 : targets[row] == likeliest(row) ? 1 : 0;
    EXPECT_EQ(is_likeliest[row], expected) << row;
  }
}

// Of equally likely tokens the one with the lowest id is the likeliest.
TEST_F(PrefillTest, ScoresKnowTies) {
  constexpr std::int64_t kVocab = 3000;
  std::vector<float> logits(3 * kVocab, 1.0f);
  logits[kVocab + 2100] = logits[kVocab + 1500] = 2.0f;
  logits[2 * kVocab + 2999] = logits[2 * kVocab + 40] = logits[2 * kVocab + 1064] = 3.0f;
  const std::vector<std::vector<std::int32_t>> targets = {
      {0, 1500, 40}, {1, 2100, 1064}, {2999, 0, 2999}, {-1, -1, -1}};
  cuda::DeviceMemory device_logits(std::ssize(logits) * 4, "logits");
  cuda::DeviceMemory device_targets(3 * 4, "targets");
  cuda::DeviceMemory device_scores(3 * static_cast<std::int64_t>(sizeof(cuda::RowScore)), "scores");
  const auto send = [](const cuda::DeviceMemory& to, const auto& from) {
    cuda::check(
        cudaMemcpy(to.as<>(), from.data(), std::span(from).size_bytes(), cudaMemcpyHostToDevice),
        "sending");
  };
  send(device_logits, logits);
  for (std::size_t round = 0; round < targets.size(); ++round) {
    send(device_targets, targets[round]);
    cuda::launch_score(device_logits.as<float>(), device_targets.as<std::int32_t>(),
                       device_scores.as<cuda::RowScore>(), 3, kVocab, nullptr);
    std::vector<cuda::RowScore> scores(3);
    cuda::check(cudaMemcpy(scores.data(), device_scores.as<>(), std::span(scores).size_bytes(),
                           cudaMemcpyDeviceToHost),
                "fetching scores");
    for (const cuda::RowScore& score : scores) {
      EXPECT_EQ(score.all_finite, 1);
      EXPECT_EQ(score.target_is_likeliest, round == 0 ? 1 : 0) << round;
    }
  }
}

TEST_F(PrefillTest, OnlyTheLastLogits) {
  const ModelConfig config = config_of(kShape);
  const auto model = make_random_model(config);
  const auto tokens = tokens_without_0(config.vocab_size, 77, 13);
  const auto width = static_cast<std::size_t>(config.vocab_size);
  const auto expected = reference_logits(*model, tokens);
  std::vector<float> last(width);
  PrefillOutput output;
  output.last_logits = last;
  Prompter(*model).run(tokens, 0, output);
  EXPECT_LT(relative_error(last, std::span(expected).last(width)), tolerance(config.dtype));
}

// Tokens prefilled, then decoded one by one, then prefilled again.
TEST_F(PrefillTest, DecodeGoesOnFromThePages) {
  for (const DType dtype : {DType::float16, DType::bfloat16}) {
    Shape shape = kShape;
    shape.dtype = dtype;
    const ModelConfig config = config_of(shape);
    const auto model = make_random_model(config);
    const auto backend = make_cuda_backend(model, {});
    const auto tokens = tokens_without_0(config.vocab_size, 230, 14);
    const auto expected = reference_logits(*model, tokens);
    const auto width = static_cast<std::size_t>(config.vocab_size);
    const SequenceId id = backend->create_sequence({});
    backend->prefill(id, std::span(tokens).first(100), {});
    std::vector<float> logits(width);
    for (std::size_t i = 100; i < 130; ++i) {
      backend->decode(std::vector{id}, std::vector{tokens[i]}, 1, {}, logits);
      EXPECT_LT(relative_error(logits, std::span(expected).subspan(i * width, width)),
                2 * tolerance(dtype))
          << i;
    }
    PrefillOutput output;
    output.last_logits = logits;
    backend->prefill(id, std::span(tokens).subspan(130), output);
    EXPECT_LT(relative_error(logits, std::span(expected).last(width)), 2 * tolerance(dtype));
    EXPECT_EQ(backend->length(id), 230);
  }
}

TEST_F(PrefillTest, ABrokenCaptureLeavesNoStreamInCaptureMode) {
  cudaStream_t side = nullptr;
  cudaEvent_t event = nullptr;
  cuda::check(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking), "creating a stream");
  cuda::check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
  const auto fork_and_fail = [&](cudaStream_t stream) {
    cuda::check(cudaEventRecord(event, stream), "recording an event");
    cuda::check(cudaStreamWaitEvent(side, event), "waiting for an event");
    throw std::runtime_error("meant to fail");
  };
  EXPECT_THAT([&] { const cuda::CapturedGraph graph(fork_and_fail); },
              testing::ThrowsMessage<std::runtime_error>("meant to fail"));
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusActive;
  EXPECT_EQ(cudaStreamIsCapturing(side, &status), cudaSuccess);
  EXPECT_EQ(status, cudaStreamCaptureStatusNone);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(side), cudaSuccess);
  EXPECT_EQ(cudaEventDestroy(event), cudaSuccess);
}

TEST_F(PrefillTest, RefusesOutputsOfTheWrongSize) {
  const ModelConfig config = config_of(kShape);
  const auto backend = make_cuda_backend(make_random_model(config), {});
  const SequenceId id = backend->create_sequence({});
  const auto tokens = tokens_without_0(config.vocab_size, 20, 15);
  std::vector<float> logits(7);
  PrefillOutput all, last, scored;
  all.all_logits = logits;
  last.last_logits = logits;
  scored.targets = std::span(tokens).first(7);
  scored.target_logprobs = logits;
  const auto expect = [&](const char* words, std::span<const TokenId> prompt,
                          const PrefillOutput& output) {
    EXPECT_THAT([&] { backend->prefill(id, prompt, output); },
                testing::ThrowsMessage<Error>(testing::HasSubstr(words)));
  };
  expect("all_logits must have 20 x 301 elements", tokens, all);
  expect("last_logits must have 301 elements", tokens, last);
  expect("targets and target_logprobs must both have 20 elements or none", tokens, scored);
  expect("at least one token", {}, {});
  expect("tokens[1] is 301, but token ids of this model lie in [0, 301)",
         std::vector<TokenId>{1, 301}, {});
  EXPECT_EQ(backend->length(id), 0);
}

}  // namespace
}  // namespace clusterfusion::test
