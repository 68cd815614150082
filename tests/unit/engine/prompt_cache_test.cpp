// Prompts saved to files and loaded by other engines, on a small model on the CPU: texts are bit
// for bit those without, and a file that does not fit or is damaged is refused.
#include <gtest/gtest.h>

#include <random>

#include "engine/fixtures.hpp"
#include "engine/make_engine.hpp"
#include "io/file_fixtures.hpp"
#include "io/mapped_file.hpp"
#include "model/fingerprint.hpp"
#include "support/random_model.hpp"

namespace clusterfusion {
namespace {

using namespace test;
using clusterfusion::test::TemporaryFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr std::size_t kMostBytes = 64 << 20;

std::shared_ptr<const Model> seeded_model(std::uint64_t seed) {
  ModelConfig config = small_config();
  config.vocab_size = kVocabSize;
  config.max_positions = 1024;
  config.bos_token.reset();
  config.eos_tokens = {kEndOfText};
  return make_random_model(config, {.seed = seed});
}

struct Setting {
  std::uint64_t seed = 1;
  DType kv_dtype = DType::float32;
  std::int64_t kv_pages = 100;
  bool prefix_cache = true;
};

std::unique_ptr<Engine> engine_with(const Setting& setting = {}) {
  const std::shared_ptr<const Model> model = seeded_model(setting.seed);
  BackendOptions options{.threads = 1, .kv_dtype = setting.kv_dtype};
  options.kv_bytes = setting.kv_pages * make_cpu_backend(model, options)->info().page_bytes();
  return make_engine(model, byte_tokenizer(), make_cpu_backend(model, options), "a test", {},
                     {.prefix_cache = setting.prefix_cache});
}

std::vector<TokenId> prompt_of(int length, int seed = 3) {
  std::vector<TokenId> tokens;
  for (int i = 0; i < length; ++i)
    tokens.push_back((seed * 7919 + i * 104729 + i * i) % kVocabSize);
  return tokens;
}

GenerateResult generate(Engine& engine, const std::vector<TokenId>& prompt) {
  GenerateRequest request;
  request.prompt_tokens = prompt;
  request.max_new_tokens = 30;
  request.ignore_eos = true;
  request.sampling = {.temperature = 1, .seed = 9, .num_logprobs = 2};
  return engine.generate(request);
}

void expect_same(const GenerateResult& a, const GenerateResult& b) {
  EXPECT_EQ(a.tokens, b.tokens);
  ASSERT_EQ(a.sampled.size(), b.sampled.size());
  for (std::size_t i = 0; i < a.sampled.size(); ++i) {
    EXPECT_EQ(a.sampled[i].logprob, b.sampled[i].logprob);
    EXPECT_EQ(a.sampled[i].top[1].logprob, b.sampled[i].top[1].logprob);
  }
}

std::size_t num_files(const TemporaryFolder& folder) {
  return static_cast<std::size_t>(
      std::distance(std::filesystem::directory_iterator(folder.path()), {}));
}

TEST(PromptCache, TextsAreThoseWithout) {
  const TemporaryFolder folder;
  for (const DType dtype : {DType::float32, DType::float16}) {
    for (const int length : {64, 65, 200, 700}) {
      const auto file = folder.path() / "prompt";
      const std::vector<TokenId> prompt = prompt_of(length);
      const auto saving = engine_with({.kv_dtype = dtype});
      EXPECT_EQ(saving->save_prompt_cache(prompt, file), length / 64 * 64);
      std::vector<TokenId> longer = prompt;
      for (const TokenId token : prompt_of(90, 5)) longer.push_back(token);
      for (const std::vector<TokenId>& one : {prompt, longer}) {
        const auto plain = engine_with({.kv_dtype = dtype, .prefix_cache = false});
        const auto loading = engine_with({.kv_dtype = dtype});
        EXPECT_EQ(loading->load_prompt_cache(file, one), length / 64 * 64);
        const GenerateResult result = generate(*loading, one);
        expect_same(result, generate(*plain, one));
        EXPECT_EQ(result.statistics.prefix_hit_tokens,
                  (std::ssize(one) - 1) / 64 * 64 >= length / 64 * 64
                      ? length / 64 * 64
                      : (std::ssize(one) - 1) / 64 * 64);
      }
      expect_same(generate(*saving, longer), generate(*engine_with({.kv_dtype = dtype}), longer));
    }
  }
  EXPECT_EQ(num_files(folder), 1u);
}

TEST(PromptCache, SavesWhatThePrefixCacheHasAlready) {
  const TemporaryFolder folder;
  const auto engine = engine_with();
  generate(*engine, prompt_of(300));
  const std::int64_t hits = engine->serving_statistics().prefix_hit_tokens;
  EXPECT_EQ(engine->save_prompt_cache(prompt_of(300), folder.path() / "a"), 256);
  EXPECT_GT(engine->serving_statistics().prefix_hit_tokens, hits);
  EXPECT_EQ(engine->load_prompt_cache(folder.path() / "a"), 256) << "what is there may be loaded";
  const ServingStatistics statistics = engine->serving_statistics();
  EXPECT_EQ(statistics.kv_pages_in_use, statistics.kv_pages_cached) << "nothing stays pinned";
}

TEST(PromptCache, LoadedPagesMakeRoomForOthers) {
  const TemporaryFolder folder;
  engine_with()->save_prompt_cache(prompt_of(300), folder.path() / "a");
  const auto small = engine_with({.kv_pages = 5});
  small->load_prompt_cache(folder.path() / "a");
  expect_same(generate(*small, prompt_of(200, 8)), generate(*engine_with(), prompt_of(200, 8)));
  small->load_prompt_cache(folder.path() / "a");
  expect_same(generate(*small, prompt_of(270)), generate(*engine_with(), prompt_of(270)));
  const auto tiny = engine_with({.kv_pages = 3});
  expect_error(ErrorKind::out_of_memory, HasSubstr("no room for page 3"),
               [&] { tiny->load_prompt_cache(folder.path() / "a"); });
  expect_same(generate(*tiny, prompt_of(100)), generate(*engine_with(), prompt_of(100)));
}

TEST(PromptCache, RefusesWhatDoesNotFit) {
  const TemporaryFolder folder;
  const auto file = folder.path() / "prompt";
  const auto engine = engine_with();
  engine->save_prompt_cache(prompt_of(200), file);
  const auto expect_refused = [&](Engine& other, const std::vector<TokenId>& prompt,
                                  const char* words) {
    expect_error(ErrorKind::invalid_argument, AllOf(HasSubstr(words), HasSubstr("delete")),
                 [&] { other.load_prompt_cache(file, prompt); });
  };
  expect_refused(*engine_with({.seed = 2}), {}, "fingerprint");
  expect_refused(*engine_with({.kv_dtype = DType::float16}), {}, "type \"float16\"");
  std::vector<TokenId> other = prompt_of(200);
  other[100] = (other[100] + 1) % kVocabSize;
  expect_refused(*engine, other, "token 100 is");
  expect_refused(*engine, prompt_of(150), "ends after 150");
  expect_error(ErrorKind::not_found, HasSubstr("nothing"),
               [&] { engine->load_prompt_cache(folder.path() / "nothing"); });
  expect_error(ErrorKind::malformed, HasSubstr("--prompt-cache"), [&] {
    engine->load_prompt_cache(folder.write("weights", clusterfusion::test::safetensors_head("{}")));
  });
}

TEST(PromptCache, RefusesToSaveWhatCannotBeUsed) {
  const TemporaryFolder folder;
  const auto file = folder.path() / "prompt";
  const auto engine = engine_with();
  expect_error(ErrorKind::invalid_argument, HasSubstr("63 tokens"),
               [&] { engine->save_prompt_cache(prompt_of(63), file); });
  expect_error(ErrorKind::out_of_range, HasSubstr("prompt[64]"), [&] {
    std::vector<TokenId> prompt = prompt_of(65);
    prompt[64] = kVocabSize;
    engine->save_prompt_cache(prompt, file);
  });
  engine->ablate({.heads = {}, .mlps = {0}});
  expect_error(ErrorKind::invalid_argument, HasSubstr("ablated"),
               [&] { engine->save_prompt_cache(prompt_of(64), file); });
  const auto without = engine_with({.prefix_cache = false});
  expect_error(ErrorKind::invalid_argument, HasSubstr("prefix_cache"),
               [&] { without->save_prompt_cache(prompt_of(64), file); });
  expect_error(ErrorKind::out_of_memory, HasSubstr("kv_bytes"),
               [&] { engine_with({.kv_pages = 2})->save_prompt_cache(prompt_of(200), file); });
  EXPECT_EQ(num_files(folder), 0u);
}

// Whatever byte is another, or missing: an error, or the text.
TEST(PromptCache, DamagedFilesGiveNoWrongText) {
  const TemporaryFolder folder;
  const auto file = folder.path() / "prompt";
  const std::vector<TokenId> prompt = prompt_of(130);
  engine_with()->save_prompt_cache(prompt, file);
  const std::string whole = read_file(file, kMostBytes);
  const GenerateResult expected = generate(*engine_with(), prompt);
  std::mt19937 random(1);
  const auto engine = engine_with();
  int refused = 0;
  const auto try_it = [&](const std::string& content) {
    const auto damaged = folder.write("damaged", content);
    const auto fresh = engine_with();
    try {
      fresh->load_prompt_cache(damaged, prompt);
    } catch (const Error& error) {
      ++refused;
      EXPECT_NE(error.kind(), ErrorKind::internal) << error.what();
      EXPECT_THAT(error.what(), HasSubstr("damaged"));
    }
    expect_same(generate(*fresh, prompt), expected);
  };
  for (int i = 0; i < 40; ++i) {
    std::string content = whole;
    // Half of them in the header and the tokens.
    const std::size_t at = random() % (i % 2 == 0 ? whole.size() : 1200);
    content[at] = static_cast<char>(content[at] ^ (1 << random() % 8));
    try_it(content);
  }
  EXPECT_GE(refused, 20);
  refused = 0;
  for (int i = 0; i < 20; ++i) try_it(whole.substr(0, random() % whole.size()));
  try_it(whole + "x");
  EXPECT_EQ(refused, 21);
}

TEST(Fingerprint, SeesEveryWeight) {
  const auto model = seeded_model(1);
  const std::string before = fingerprint_of(*model);
  EXPECT_EQ(before.size(), 16u);
  EXPECT_EQ(fingerprint_of(*seeded_model(1)), before);
  EXPECT_NE(fingerprint_of(*seeded_model(2)), before);
  std::mt19937 random(2);
  const auto expect_seen = [&](const DLTensor& tensor) {
    if (tensor.data == nullptr) return;
    auto* const data = static_cast<unsigned char*>(tensor.data) + tensor.byte_offset;
    std::int64_t count = 1;
    for (int axis = 0; axis < tensor.ndim; ++axis) count *= tensor.shape[axis];
    const auto at = random() % static_cast<std::size_t>(count * tensor.dtype.bits / 8);
    data[at] ^= 1;
    EXPECT_NE(fingerprint_of(*model), before);
    data[at] ^= 1;
  };
  const ModelWeights& weights = model->weights();
  expect_seen(weights.embedding);
  expect_seen(weights.lm_head);
  expect_seen(weights.final_norm_weight);
  expect_seen(weights.final_norm_bias);
  for (const LayerWeights& layer : weights.layers) {
    for (const DLTensor& tensor : layer.tensors) expect_seen(tensor);
  }
  EXPECT_EQ(fingerprint_of(*model), before);
}

}  // namespace
}  // namespace clusterfusion
