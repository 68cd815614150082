#include "engine/fixtures.hpp"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <random>

#include "engine/make_engine.hpp"
#include "support/random_model.hpp"

namespace clusterfusion::test {
namespace {

// UTF-8 of a code point below 0x800.
std::string utf8(int code_point) {
  if (code_point < 0x80) return {static_cast<char>(code_point)};
  return {static_cast<char>(0xC0 | code_point >> 6), static_cast<char>(0x80 | (code_point & 0x3F))};
}

// The byte-level alphabet of GPT-2 (bytes_to_unicode in transformers' tokenization_gpt2.py).
std::vector<std::string> byte_alphabet() {
  std::vector<std::string> alphabet;
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) ||
                           (byte >= 0xAE && byte <= 0xFF);
    alphabet.push_back(utf8(printable ? byte : next++));
  }
  return alphabet;
}

nlohmann::json file_with(const nlohmann::json& vocab) {
  const nlohmann::json byte_level = {{"type", "ByteLevel"},
                                     {"add_prefix_space", false},
                                     {"trim_offsets", true},
                                     {"use_regex", true}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", nlohmann::json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", nlohmann::json::array()}}}};
}

}  // namespace

std::string tokenizer_json(int size) {
  nlohmann::json vocab;
  for (int id = 0; id < size; ++id) vocab[fmt::format("t{}", id)] = id;
  return file_with(vocab).dump();
}

std::string with_added_token(const std::string& json, int id, const std::string& content) {
  nlohmann::json file = nlohmann::json::parse(json);
  file["added_tokens"].push_back({{"id", id},
                                  {"content", content},
                                  {"single_word", false},
                                  {"lstrip", false},
                                  {"rstrip", false},
                                  {"normalized", false},
                                  {"special", true}});
  return file.dump();
}

std::shared_ptr<const Tokenizer> byte_tokenizer() {
  static const std::shared_ptr<const Tokenizer> tokenizer = [] {
    nlohmann::json vocab;
    vocab["<|endoftext|>"] = kEndOfText;
    TokenId id = 1;
    for (const std::string& symbol : byte_alphabet()) vocab[symbol] = id++;
    vocab["Ġthe"] = kThe;
    vocab["theĠENDĠof"] = kEnding;
    vocab["abcd"] = kLast;
    nlohmann::json file = file_with(vocab);
    file["added_tokens"].push_back({{"id", kEndOfText},
                                    {"content", "<|endoftext|>"},
                                    {"single_word", false},
                                    {"lstrip", false},
                                    {"rstrip", false},
                                    {"normalized", false},
                                    {"special", true}});
    return Tokenizer::parse(file.dump(), "byte tokenizer");
  }();
  return tokenizer;
}

std::vector<TokenId> bytes_to_tokens(std::string_view text) {
  std::vector<TokenId> tokens;
  for (const char c : text) tokens.push_back(1 + static_cast<unsigned char>(c));
  return tokens;
}

std::vector<TokenId> random_tokens(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<TokenId> tokens(count);
  for (TokenId& token : tokens) token = static_cast<TokenId>(random() % kVocabSize);
  return tokens;
}

std::shared_ptr<const Model> tiny_model() {
  static const std::shared_ptr<const Model> model = [] {
    ModelConfig config = small_config();
    config.vocab_size = kVocabSize;
    config.bos_token.reset();
    config.eos_tokens = {kEndOfText};
    return make_random_model(config);
  }();
  return model;
}

Script say(std::vector<TokenId> continuation, std::size_t prompt_size) {
  return [continuation = std::move(continuation), prompt_size](std::span<const TokenId> tokens) {
    const std::size_t done = tokens.size() - prompt_size;
    const TokenId next = done < continuation.size() ? continuation[done] : 1 + 'x';
    std::vector<float> logits(kVocabSize, 0.0f);
    logits[static_cast<std::size_t>(next)] = 10;
    return logits;
  };
}

Script say(std::string_view continuation, std::size_t prompt_size) {
  return say(bytes_to_tokens(continuation), prompt_size);
}

Script hashed_logits() {
  return [](std::span<const TokenId> tokens) {
    std::uint32_t hash = 2166136261;  // FNV-1a
    for (const TokenId token : tokens) hash = (hash ^ static_cast<std::uint32_t>(token)) * 16777619;
    std::vector<float> logits;
    for (std::int64_t i = 0; i < kVocabSize; ++i) {
      hash = hash * 1664525 + 1013904223;
      logits.push_back(static_cast<float>(hash >> 8) * 0x1p-22f);
    }
    return logits;
  };
}

FakeEngine fake_engine(Script script, const std::function<void(FakeState&)>& set,
                       std::int64_t capacity, StopRequest interrupted,
                       SchedulerOptions scheduling) {
  FakeEngine fake;
  if (set) set(*fake.state);
  auto backend = std::make_unique<FakeBackend>(fake.state, kVocabSize, std::move(script));
  backend->capacity = capacity;
  fake.engine = make_engine(tiny_model(), byte_tokenizer(), std::move(backend), "a test",
                            std::move(interrupted), std::move(scheduling));
  return fake;
}

FakeEngine fake_engine_in(std::shared_ptr<FakeState> state, Script script,
                          const std::function<void(FakeState&)>& set, SchedulerOptions scheduling) {
  FakeEngine fake{std::move(state), nullptr};
  set(*fake.state);
  fake.engine =
      make_engine(tiny_model(), byte_tokenizer(),
                  std::make_unique<FakeBackend>(fake.state, kVocabSize, std::move(script)),
                  "a test", {}, std::move(scheduling));
  return fake;
}

GenerateRequest one_token_request(std::int64_t max_new_tokens) {
  GenerateRequest request;
  request.prompt_tokens = {1 + 'p'};
  request.max_new_tokens = max_new_tokens;
  return request;
}

}  // namespace clusterfusion::test
