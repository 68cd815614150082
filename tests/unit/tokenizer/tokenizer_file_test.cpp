// What a tokenizer.json may not say, and in which words it is refused.
#include "tokenizer/tokenizer_file.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "clusterfusion/error.hpp"
#include "clusterfusion/tokenizer.hpp"
#include "small_tokenizer.hpp"

namespace clusterfusion {
namespace {

using Json = nlohmann::json;

struct Refusal {
  std::string change;  // what is wrong
  std::function<void(Json&)> apply;
  ErrorKind kind;
  std::string message;
};

void PrintTo(const Refusal& refusal, std::ostream* out) { *out << refusal.change; }

// The text `sequence` and then the special token "s".
Json text_template(const char* sequence) {
  return {{"type", "TemplateProcessing"},
          {"single",
           {{{"Sequence", {{"id", sequence}, {"type_id", 0}}}},
            {{"SpecialToken", {{"id", "s"}, {"type_id", 0}}}}}},
          {"pair", Json::array()},
          {"special_tokens", {{"s", {{"id", "s"}, {"ids", {9}}, {"tokens", {"<eos>"}}}}}}};
}

const std::vector<Refusal> kRefusals = {
    {"NoModel", [](Json& json) { json.erase("model"); }, ErrorKind::malformed,
     "f.json has no key \"model\""},
    {"NoVocabulary", [](Json& json) { json["model"].erase("vocab"); }, ErrorKind::malformed,
     "f.json: \"model\" has no key \"vocab\""},
    {"NoMerges", [](Json& json) { json["model"].erase("merges"); }, ErrorKind::malformed,
     "f.json: \"model\" has no key \"merges\""},
    {"NoPreTokenizer", [](Json& json) { json.erase("pre_tokenizer"); }, ErrorKind::unsupported,
     "f.json: \"pre_tokenizer\" is without \"ByteLevel\" and \"decoder\" has it, which is not "
     "supported; supported: both or neither"},
    {"NoDecoder", [](Json& json) { json["decoder"] = nullptr; }, ErrorKind::unsupported,
     "f.json: \"decoder\" is null or missing, which is not supported; supported: \"ByteLevel\", or "
     "a \"Sequence\" for text that is not byte-level"},
    {"NoPrefixSpace", [](Json& json) { json["pre_tokenizer"].erase("add_prefix_space"); },
     ErrorKind::malformed, "f.json: \"pre_tokenizer\" has no key \"add_prefix_space\""},
    {"Version", [](Json& json) { json["version"] = "2.0"; }, ErrorKind::unsupported,
     "f.json: \"version\" is \"2.0\", which is not supported; supported: \"1.0\""},
    {"NoModelType",
     [](Json& json) {
       json["model"].erase("type");
       json["model"].erase("merges");
     },
     ErrorKind::unsupported,
     "f.json: \"model\" has no key \"type\", and without \"vocab\" and \"merges\" it is no BPE "
     "model, "
     "which is not supported; supported: \"BPE\""},
    {"ModelType", [](Json& json) { json["model"]["type"] = "WordPiece"; }, ErrorKind::unsupported,
     "f.json: \"model\": \"type\" is \"WordPiece\", which is not supported; supported: \"BPE\""},
    {"Normalizer", [](Json& json) { json["normalizer"]["type"] = "Lowercase"; },
     ErrorKind::unsupported,
     "f.json: \"normalizer\": \"type\" is \"Lowercase\", which is not supported; supported: null, "
     "\"NFC\", \"NFKC\", \"Prepend\", \"Replace\", \"Strip\" or a \"Sequence\" of them"},
    {"PreTokenizer", [](Json& json) { json["pre_tokenizer"]["type"] = "BertPreTokenizer"; },
     ErrorKind::unsupported,
     "f.json: \"pre_tokenizer\": \"type\" is \"BertPreTokenizer\", which is not supported; "
     "supported: null, \"ByteLevel\", \"Split\", \"Metaspace\", \"Digits\", \"Punctuation\", "
     "\"WhitespaceSplit\" or a \"Sequence\" of them"},
    {"FirstBehindStrip",
     [](Json& json) {
       const Json byte_level = json["pre_tokenizer"];
       const Json metaspace = {
           {"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", "first"}};
       json["normalizer"] = {{"type", "Strip"}, {"strip_left", true}, {"strip_right", false}};
       json["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {metaspace, byte_level}}};
     },
     ErrorKind::unsupported,
     "f.json: \"pre_tokenizer\" has a \"prepend_scheme\" of \"first\" behind a \"normalizer\" that "
     "may take away a text's beginning, which is not supported; supported there: \"always\" or "
     "\"never\""},
    {"BehindByteLevel",
     [](Json& json) {
       const Json byte_level = json["pre_tokenizer"];
       const Json digits = {{"type", "Digits"}, {"individual_digits", true}};
       json["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {byte_level, digits}}};
     },
     ErrorKind::unsupported,
     "f.json: \"pre_tokenizer\": \"pretokenizers\"[1] stands behind a \"ByteLevel\", which is not "
     "supported; supported: \"ByteLevel\" as the last"},
    {"SplitBehavior",
     [](Json& json) {
       json["pre_tokenizer"] = {
           {"type", "Split"}, {"pattern", {{"String", "a"}}}, {"behavior", "Merged"}};
     },
     ErrorKind::unsupported,
     "f.json: \"pre_tokenizer\": \"behavior\" is \"Merged\", which is not supported; supported: "
     "\"Isolated\", \"Removed\", \"Contiguous\", \"MergedWithPrevious\" or \"MergedWithNext\""},
    {"SplitPattern",
     [](Json& json) {
       json["pre_tokenizer"] = {
           {"type", "Split"}, {"pattern", {{"Glob", "a"}}}, {"behavior", "Isolated"}};
     },
     ErrorKind::malformed,
     "f.json: \"pre_tokenizer\": \"pattern\" must be an object with the key \"String\" or "
     "\"Regex\", found {\"Glob\":\"a\"}"},
    {"SplitRegex",
     [](Json& json) {
       json["pre_tokenizer"] = {
           {"type", "Split"}, {"pattern", {{"Regex", "a(?<n>b)"}}}, {"behavior", "Isolated"}};
     },
     ErrorKind::unsupported,
     "f.json: \"pre_tokenizer\": \"pattern\": \"Regex\" is \"a(?<n>b)\", which is not supported: "
     "at "
     "byte 3 there is a group of a kind that is not known here; supported: what Oniguruma and "
     "PCRE2 "
     "have in common, without captures by name or number"},
    {"DecoderOrder",
     [](Json& json) {
       json["pre_tokenizer"] = nullptr;
       json["decoder"] = {
           {"type", "Sequence"},
           {"decoders",
            {{{"type", "Fuse"}},
             {{"type", "Replace"}, {"pattern", {{"String", "_"}}}, {"content", " "}}}}};
     },
     ErrorKind::unsupported,
     "f.json: \"decoder\": \"decoders\"[1]: \"Replace\" behind what stands before it is not "
     "supported; supported: \"ByteLevel\" alone, or \"Replace\", \"Metaspace\" and \"Strip\", then "
     "\"ByteFallback\", then \"Fuse\", then \"Strip\""},
    {"UnknownTokenOfNoVocabulary",
     [](Json& json) {
       json["pre_tokenizer"] = nullptr;
       json["decoder"] = {{"type", "Fuse"}};
       json["model"]["unk_token"] = "?";
     },
     ErrorKind::malformed,
     "f.json: \"model\": \"unk_token\" must be a token of the vocabulary, found \"?\""},
    {"Decoder", [](Json& json) { json["decoder"]["type"] = "WordPiece"; }, ErrorKind::unsupported,
     "f.json: \"decoder\": \"type\" is \"WordPiece\", which is not supported; supported: "
     "\"ByteLevel\", \"Replace\", \"Metaspace\", \"Strip\", \"ByteFallback\", \"Fuse\" or a "
     "\"Sequence\" of them"},
    {"PostProcessor", [](Json& json) { json["post_processor"]["type"] = "BertProcessing"; },
     ErrorKind::unsupported,
     "f.json: \"post_processor\": \"type\" is \"BertProcessing\", which is not supported; "
     "supported: null, \"ByteLevel\", \"TemplateProcessing\" or a \"Sequence\" of them"},
    {"Dropout", [](Json& json) { json["model"]["dropout"] = 0.1; }, ErrorKind::unsupported,
     "f.json: \"model\": \"dropout\" is not supported: set it to null or 0"},
    {"SubwordPrefix", [](Json& json) { json["model"]["continuing_subword_prefix"] = "##"; },
     ErrorKind::unsupported,
     "f.json: \"model\": \"continuing_subword_prefix\" is \"##\", which is not supported; "
     "supported: null or \"\""},
    {"WordSuffix", [](Json& json) { json["model"]["end_of_word_suffix"] = "</w>"; },
     ErrorKind::unsupported,
     "f.json: \"model\": \"end_of_word_suffix\" is \"</w>\", which is not supported; supported: "
     "null or \"\""},
    {"ByteFallback", [](Json& json) { json["model"]["byte_fallback"] = true; },
     ErrorKind::unsupported,
     "f.json: \"model\": \"byte_fallback\" is true, but the vocabulary has no token for the byte "
     "0x00; supported: null, or a vocabulary with a token for each of the 256 bytes"},
    {"UnknownToken", [](Json& json) { json["model"]["unk_token"] = "a"; }, ErrorKind::unsupported,
     "f.json: \"model\": \"unk_token\" is \"a\", but the vocabulary has no token for the byte "
     "0x00; "
     "supported: null, or a vocabulary with a token for each of the 256 bytes"},
    {"EmptyVocabulary", [](Json& json) { json["model"]["vocab"] = Json::object(); },
     ErrorKind::malformed, "f.json: \"model\": \"vocab\" is empty; expected at least one token"},
    {"IdTwice", [](Json& json) { json["model"]["vocab"]["b"] = 0; }, ErrorKind::malformed,
     "f.json: \"model\": \"vocab\": \"b\" must be an id of its own, found 0, which \"a\" has too; "
     "expected each of 0 to 8 once"},
    {"Hole", [](Json& json) { json["model"]["vocab"]["b"] = 9; }, ErrorKind::malformed,
     "f.json: \"model\": \"vocab\": \"b\" must be an integer from 0 to 8, found 9"},
    {"HugeId", [](Json& json) { json["model"]["vocab"]["b"] = 5000000000; }, ErrorKind::malformed,
     "f.json: \"model\": \"vocab\": \"b\" must be an integer from 0 to 8, found 5000000000"},
    {"NegativeId", [](Json& json) { json["model"]["vocab"]["b"] = -1; }, ErrorKind::malformed,
     "f.json: \"model\": \"vocab\": \"b\" must be an integer from 0 to 8, found -1"},
    {"IdIsText", [](Json& json) { json["model"]["vocab"]["b"] = "1"; }, ErrorKind::malformed,
     "f.json: \"model\": \"vocab\": \"b\" must be an integer from 0 to 8, found \"1\""},
    {"MergeOfUnknown", [](Json& json) { json["model"]["merges"][1] = "a z"; }, ErrorKind::malformed,
     "f.json: \"model\": \"merges\"[1] must be two tokens that give a third, but \"z\" is not in "
     "the "
     "vocabulary, found \"a z\""},
    {"MergeIntoUnknown",
     [](Json& json) {
       json["model"]["merges"][1] = {"b", "a"};
     },
     ErrorKind::malformed,
     "f.json: \"model\": \"merges\"[1] must be two tokens that give a third, but \"ba\" is not in "
     "the vocabulary, found [\"b\",\"a\"]"},
    {"MergeOfThree", [](Json& json) { json["model"]["merges"][0] = "a b c"; }, ErrorKind::malformed,
     "f.json: \"model\": \"merges\"[0] must be two tokens, as \"a b\" or [\"a\", \"b\"], found \"a "
     "b "
     "c\""},
    {"MergeIsNumber", [](Json& json) { json["model"]["merges"][2] = 7; }, ErrorKind::malformed,
     "f.json: \"model\": \"merges\"[2] must be two tokens, as \"a b\" or [\"a\", \"b\"], found 7"},
    {"MergesAreText", [](Json& json) { json["model"]["merges"] = "a b"; }, ErrorKind::malformed,
     "f.json: \"model\": \"merges\" must be a list of merges, found \"a b\""},
    {"AddedTokenWithoutFlag", [](Json& json) { json["added_tokens"][0].erase("lstrip"); },
     ErrorKind::malformed, "f.json: \"added_tokens\"[0] has no key \"lstrip\""},
    {"AddedTokenId", [](Json& json) { json["added_tokens"][1]["id"] = 12; }, ErrorKind::malformed,
     "f.json: \"added_tokens\"[1]: \"id\" must be 10, the id that \"<x>\" has in the vocabulary or "
     "the next free one, found 12"},
    {"AddedTokenHugeId", [](Json& json) { json["added_tokens"][1]["id"] = 2147483648; },
     ErrorKind::malformed,
     "f.json: \"added_tokens\"[1]: \"id\" must be an integer from 0 to 2147483646, found "
     "2147483648"},
    {"AddedTokenTwice", [](Json& json) { json["added_tokens"].push_back(json["added_tokens"][1]); },
     ErrorKind::malformed,
     "f.json: \"added_tokens\"[2]: \"<x>\" stands in the list twice; expected once"},
    {"AddedTokenEmpty", [](Json& json) { json["added_tokens"][0]["content"] = ""; },
     ErrorKind::malformed,
     "f.json: \"added_tokens\"[0]: \"content\" must be a text that is not empty, found \"\""},
    {"AddedTokensEqualInNfc",
     [](Json& json) {
       json["added_tokens"][0]["content"] = "\u00E9";
       json["added_tokens"][1]["content"] = "e\u0301";
       for (Json& token : json["added_tokens"]) token["normalized"] = true;
     },
     ErrorKind::malformed,
     "f.json: \"added_tokens\": \"\u00E9\" and \"e\u0301\" are the same text in NFC; expected "
     "different ones"},
    {"TemplateSecondText", [](Json& json) { json["post_processor"] = text_template("B"); },
     ErrorKind::unsupported,
     "f.json: \"post_processor\": \"single\"[0]: \"Sequence\": \"id\" is \"B\", which is not "
     "supported; supported: \"A\""},
    {"TemplateUnknownId",
     [](Json& json) {
       json["post_processor"] = text_template("A");
       json["post_processor"]["special_tokens"]["s"]["ids"] = {0, 11};
     },
     ErrorKind::malformed,
     "f.json: \"post_processor\": \"special_tokens\": \"s\": \"ids\"[1] must be an integer from 0 "
     "to "
     "10, found 11"},
    {"TemplateUnknownToken",
     [](Json& json) {
       json["post_processor"] = text_template("A");
       json["post_processor"]["special_tokens"] = Json::object();
     },
     ErrorKind::malformed, "f.json: \"post_processor\": \"special_tokens\" has no key \"s\""},
    {"TemplateTwice",
     [](Json& json) {
       const Json part = text_template("A");
       json["post_processor"] = {{"type", "Sequence"}, {"processors", {part, part}}};
     },
     ErrorKind::unsupported,
     "f.json: \"post_processor\": \"processors\"[1]: a second TemplateProcessing is not supported; "
     "supported: one"},
};

class RefusalTest : public testing::TestWithParam<Refusal> {};

TEST_P(RefusalTest, SaysWhy) {
  Json json = small_tokenizer();
  GetParam().apply(json);
  try {
    Tokenizer::parse(json.dump(), "f.json");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.what(), GetParam().message);
    EXPECT_EQ(error.kind(), GetParam().kind);
  }
}

TEST(TokenizerFile, NamesThePlaceOfBrokenJson) {
  try {
    Tokenizer::parse("{\n  \"version\": \"1.0\",\n  ]", "f.json");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::malformed);
    EXPECT_THAT(error.what(), testing::StartsWith("f.json: broken JSON at line 3, column 3"));
  }
}

TEST(TokenizerFile, RefusesAKeyThatStandsTwice) {
  std::string text = small_tokenizer().dump();
  text.replace(text.find("\"c\":2"), 5, "\"a\":2");
  try {
    Tokenizer::parse(text, "f.json");
    FAIL() << "accepted";
  } catch (const Error& error) {
    EXPECT_STREQ(
        error.what(),
        "f.json: \"model\": \"vocab\": the key \"a\" stands there twice; expected each key "
        "once");
  }
}

INSTANTIATE_TEST_SUITE_P(TokenizerFile, RefusalTest, testing::ValuesIn(kRefusals),
                         [](const auto& info) { return info.param.change; });

}  // namespace
}  // namespace clusterfusion
