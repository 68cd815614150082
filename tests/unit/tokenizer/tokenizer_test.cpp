#include "clusterfusion/tokenizer.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "clusterfusion/error.hpp"
#include "small_tokenizer.hpp"
#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

const std::filesystem::path kGptNeoX =
    std::filesystem::path(CF_SOURCE_DIR) / "../shared/data/gpt-neox-20b-tokenizer.json";

std::shared_ptr<const Tokenizer> parse(const nlohmann::json& json) {
  return Tokenizer::parse(json.dump(), "tokenizer.json");
}

std::string stream(const std::shared_ptr<const Tokenizer>& tokenizer,
                   const std::vector<TokenId>& tokens, bool skip) {
  StreamDecoder decoder(tokenizer, skip);
  std::string text;
  for (const TokenId token : tokens) {
    const std::string piece = decoder.push(token);
    EXPECT_TRUE(is_valid_utf8(piece));
    text += piece;
  }
  text += decoder.finish();
  EXPECT_EQ(decoder.finish(), "");
  return text;
}

template <typename Action>
void expect_error(ErrorKind kind, const std::string& message, const Action& action) {
  try {
    action();
    FAIL() << "no error; expected: " << message;
  } catch (const Error& error) {
    EXPECT_EQ(error.what(), message);
    EXPECT_EQ(error.kind(), kind);
  }
}

TEST(Tokenizer, EncodesAndDecodes) {
  const auto tokenizer = parse(small_tokenizer());
  EXPECT_THAT(tokenizer->encode("ab ab<eos>e\u0301<x>c"), ElementsAre(7, 8, 9, 6, 10, 2));
  EXPECT_THAT(tokenizer->encode("\u00E9 ab"), ElementsAre(6, 8));
  EXPECT_THAT(tokenizer->encode(""), IsEmpty());
  const std::vector<TokenId> tokens{7, 8, 9, 6, 10};
  EXPECT_EQ(tokenizer->decode(tokens), "ab ab\u00E9<x>");
  EXPECT_EQ(tokenizer->decode(tokens, false), "ab ab<eos>\u00E9<x>");
  EXPECT_EQ(tokenizer->decode({}), "");
}

TEST(Tokenizer, KnowsItsTokens) {
  const auto tokenizer = parse(small_tokenizer());
  EXPECT_EQ(tokenizer->vocab_size(), 11);
  EXPECT_EQ(tokenizer->token_to_id("Ġab"), 8);
  EXPECT_EQ(tokenizer->token_to_id("<eos>"), 9);
  EXPECT_EQ(tokenizer->token_to_id(" ab"), std::nullopt);
  EXPECT_EQ(tokenizer->id_to_token(8), "Ġab");
  EXPECT_EQ(tokenizer->bytes_of(8), " ab");
  EXPECT_EQ(tokenizer->bytes_of(4), "\xC3");
  EXPECT_TRUE(tokenizer->is_special(9));
  EXPECT_FALSE(tokenizer->is_special(10));
  EXPECT_FALSE(tokenizer->is_special(-1));
  EXPECT_FALSE(tokenizer->is_special(11));
}

// As tokenizers: a model's vocabulary may be padded.
TEST(Tokenizer, IdsBehindTheVocabularyHaveNoText) {
  const auto tokenizer = parse(small_tokenizer());
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{0, 11, 2147483647, 1}), "ab");
  StreamDecoder decoder(tokenizer);
  EXPECT_EQ(decoder.push(99), "");
  EXPECT_EQ(decoder.push(0), "a");
}

// tokenizers reads them as bytes of the byte-level alphabet (huggingface/tokenizers #1392, #1996).
TEST(Tokenizer, DecodesAddedTokensToTheTextTheyWereFoundIn) {
  for (const std::string& content :
       std::vector<std::string>{"café", "ilÖveyou", "đem", "日本", "Ġ", "Ã"}) {
    nlohmann::json json = small_tokenizer();
    json["added_tokens"][1]["content"] = content;
    const bool is_known = json["model"]["vocab"].contains(content);
    if (is_known) json["added_tokens"][1]["id"] = json["model"]["vocab"][content];
    const auto tokenizer = parse(json);
    const std::string text = "ab" + content + "c";
    const std::vector<TokenId> tokens = tokenizer->encode(text);
    EXPECT_THAT(tokens, ElementsAre(7, is_known ? tokenizer->token_to_id(content).value() : 10, 2));
    // A token that merges make as well stands for its bytes.
    EXPECT_EQ(tokenizer->decode(tokens) == text, !is_known);
  }
}

TEST(Tokenizer, IgnoresWhatTrainingLeftBehind) {
  const auto plain = parse(small_tokenizer());
  for (const char* part : {"truncation", "padding", "no type"}) {
    nlohmann::json json = small_tokenizer();
    json["truncation"] = {
        {"direction", "Right"}, {"max_length", 2}, {"strategy", "LongestFirst"}, {"stride", 0}};
    json["padding"] = {{"strategy", {{"Fixed", 16}}}, {"pad_id", 9}, {"pad_token", "<eos>"}};
    if (part == std::string("no type")) json["model"].erase("type");
    const auto tokenizer = parse(json);
    EXPECT_EQ(tokenizer->encode("ab ab<x>c"), plain->encode("ab ab<x>c")) << part;
  }
}

TEST(Tokenizer, RefusesIdsOutOfRange) {
  const auto tokenizer = parse(small_tokenizer());
  expect_error(ErrorKind::out_of_range,
               "tokenizer.json: decode() token at index 0 must be an id of at least 0, found -1",
               [&] { tokenizer->decode(std::vector<TokenId>{-1}); });
  expect_error(ErrorKind::out_of_range,
               "tokenizer.json: token must be an id from 0 to 10, found 2147483647",
               [&] { (void)tokenizer->id_to_token(2147483647); });
  StreamDecoder decoder(tokenizer);
  expect_error(ErrorKind::out_of_range,
               "tokenizer.json: token must be an id from 0 to 10, found -1",
               [&] { decoder.push(-1); });
}

TEST(StreamDecoder, HoldsBackUnfinishedCharacters) {
  StreamDecoder decoder(parse(small_tokenizer()));
  EXPECT_EQ(decoder.push(7), "ab");
  EXPECT_EQ(decoder.push(4), "");
  EXPECT_EQ(decoder.push(9), "");  // a special token, left out
  EXPECT_EQ(decoder.push(5), "\u00E9");
  EXPECT_EQ(decoder.push(5), "\uFFFD");
  EXPECT_EQ(decoder.push(4), "");
  EXPECT_EQ(decoder.push(0), "\uFFFDa");
  EXPECT_EQ(decoder.push(4), "");
  EXPECT_EQ(decoder.finish(), "\uFFFD");
  EXPECT_EQ(decoder.finish(), "");
}

// Llama 2's kind: 0 "<unk>", 1 "▁", 2 "a", 3 "▁a", 4 and 5 the bytes of "é".
nlohmann::json character_tokenizer() {
  nlohmann::json json = small_tokenizer();
  const nlohmann::json vocab = {{"<unk>", 0}, {"▁", 1},      {"a", 2},
                                {"▁a", 3},    {"<0xC3>", 4}, {"<0xA9>", 5}};
  const nlohmann::json replace = {
      {"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}};
  const nlohmann::json strip = {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}};
  json["added_tokens"] = nlohmann::json::array();
  json["normalizer"] = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}};
  json["pre_tokenizer"] = nullptr;
  json["decoder"] = {
      {"type", "Sequence"},
      {"decoders", {replace, {{"type", "ByteFallback"}}, {{"type", "Fuse"}}, strip}}};
  json["model"] = {{"type", "BPE"},         {"unk_token", "<unk>"}, {"fuse_unk", true},
                   {"byte_fallback", true}, {"vocab", vocab},       {"merges", {"▁ a"}}};
  return json;
}

TEST(Tokenizer, FallsBackToBytesAndToTheUnknownToken) {
  const auto tokenizer = parse(character_tokenizer());
  EXPECT_THAT(tokenizer->encode(" aa\u00E9zz\u00E9"), ElementsAre(3, 2, 4, 5, 4, 5, 0));
  EXPECT_EQ(tokenizer->decode(std::vector<TokenId>{3, 3, 4, 5, 2}), "a a\u00E9a");
}

// One broken byte makes U+FFFD of each byte of its run, as in tokenizers.
TEST(StreamDecoder, HoldsBackRunsOfBytes) {
  StreamDecoder decoder(parse(character_tokenizer()));
  EXPECT_EQ(decoder.push(3), "a");
  EXPECT_EQ(decoder.push(4), "");
  EXPECT_EQ(decoder.push(5), "");
  EXPECT_EQ(decoder.push(3), "\u00E9 a");
  EXPECT_EQ(decoder.push(4), "");
  EXPECT_EQ(decoder.push(5), "");
  EXPECT_EQ(decoder.push(5), "");
  EXPECT_EQ(decoder.push(2), "\uFFFD\uFFFD\uFFFDa");
  EXPECT_EQ(decoder.push(4), "");
  EXPECT_EQ(decoder.finish(), "\uFFFD");
}

TEST(StreamDecoder, LeavesOutTheSpaceAtTheBeginningOfATextAlone) {
  StreamDecoder begins(parse(character_tokenizer()));
  EXPECT_EQ(begins.push(1), "");
  EXPECT_EQ(begins.push(3), " a");
  StreamDecoder continues(parse(character_tokenizer()), true, true);
  begins = continues;
  EXPECT_EQ(begins.push(3), " a");
  EXPECT_EQ(continues.push(3), " a");
}

TEST(StreamDecoder, EqualsDecodeOnRandomTokens) {
  if (!std::filesystem::exists(kGptNeoX)) GTEST_SKIP() << kGptNeoX << " is missing";
  const auto tokenizer = Tokenizer::open(kGptNeoX);
  std::mt19937 random(1);
  for (int round = 0; round < 3000; ++round) {
    // Small ids are single bytes: mostly broken UTF-8.
    const auto limit = static_cast<std::uint32_t>(round % 2 == 0 ? 300 : tokenizer->vocab_size());
    std::vector<TokenId> tokens(random() % 40);
    for (TokenId& token : tokens) token = static_cast<TokenId>(random() % limit);
    for (const bool skip : {true, false}) {
      ASSERT_EQ(stream(tokenizer, tokens, skip), tokenizer->decode(tokens, skip));
    }
  }
}

TEST(Tokenizer, MayBeSharedBetweenThreads) {
  const auto tokenizer = parse(small_tokenizer());
  const std::string text = "ab e\u0301 <eos>ab\xFF c";
  const std::vector<TokenId> expected = tokenizer->encode(text);
  std::vector<std::thread> threads;
  std::vector<int> equal(4);
  for (int& count : equal) {
    threads.emplace_back([&] {
      for (int i = 0; i < 500; ++i) {
        count += tokenizer->encode(text) == expected &&
                 stream(tokenizer, expected, true) == tokenizer->decode(expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(equal, testing::Each(500));
}

TEST(Tokenizer, TakesLongText) {
  const auto tokenizer = parse(small_tokenizer());
  std::string text;
  for (int i = 0; i < 16 << 20; ++i) text += i % 5 == 0 ? "ab c" : " ab ";
  ASSERT_EQ(text.size(), std::size_t{64} << 20);
  EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text);
}

class OpenTest : public testing::Test {
 protected:
  OpenTest() { std::filesystem::create_directories(folder_); }
  ~OpenTest() override { std::filesystem::remove_all(folder_); }
  std::filesystem::path folder_ = std::filesystem::path(testing::TempDir()) /
                                  testing::UnitTest::GetInstance()->current_test_info()->name();
};

TEST_F(OpenTest, TakesAFileOrItsFolder) {
  std::ofstream(folder_ / "tokenizer.json") << small_tokenizer();
  EXPECT_EQ(Tokenizer::open(folder_)->vocab_size(), 11);
  EXPECT_EQ(Tokenizer::open(folder_ / "tokenizer.json")->vocab_size(), 11);
}

TEST_F(OpenTest, NamesTheMissingFile) {
  try {
    Tokenizer::open(folder_);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::not_found);
    EXPECT_THAT(error.what(), testing::HasSubstr(folder_.string() + " has no tokenizer.json"));
  }
}

}  // namespace
}  // namespace clusterfusion
