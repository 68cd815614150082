#include "tokenizer/word_splitter.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace clusterfusion {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

std::vector<std::string> split(std::string_view text) {
  std::vector<std::string> words;
  WordSplitter splitter(text);
  for (auto word = splitter.next(); !word.empty(); word = splitter.next()) words.emplace_back(word);
  return words;
}

// All expectations are what tokenizers' ByteLevel pre-tokenizer gives.
TEST(WordSplitter, KeepsOneSpaceWithTheWord) {
  EXPECT_THAT(split(""), IsEmpty());
  EXPECT_THAT(split("Hello my friend,  how"),
              ElementsAre("Hello", " my", " friend", ",", " ", " how"));
  EXPECT_THAT(split("a\n\nb"), ElementsAre("a", "\n", "\n", "b"));
  EXPECT_THAT(split("a \n"), ElementsAre("a", " \n"));
  EXPECT_THAT(split("   "), ElementsAre("   "));
  EXPECT_THAT(split("a\u3000b"), ElementsAre("a", "\u3000", "b"));
  EXPECT_THAT(split("\u00A0\u2003x"), ElementsAre("\u00A0", "\u2003", "x"));
}

TEST(WordSplitter, SplitsContractions) {
  EXPECT_THAT(split("I'll don't we've'd"),
              ElementsAre("I", "'ll", " don", "'t", " we", "'ve", "'d"));
  EXPECT_THAT(split("it'S 'sx 'l"), ElementsAre("it", "'", "S", " '", "sx", " '", "l"));
  EXPECT_THAT(split("''s"), ElementsAre("''", "s"));
  EXPECT_THAT(split("'"), ElementsAre("'"));
}

TEST(WordSplitter, KnowsLettersAndNumbersOfAllScripts) {
  EXPECT_THAT(split("x2 \u00B2\u216B!?\u00E9"),
              ElementsAre("x", "2", " \u00B2\u216B", "!?", "\u00E9"));
  EXPECT_THAT(split("\u0915\u093C"), ElementsAre("\u0915", "\u093C"));  // a letter and its mark
}

TEST(WordSplitter, CoversLongTextWithoutGaps) {
  std::string text;
  for (int i = 0; i < 20000; ++i)
    text += i % 7 == 0 ? " \u2003 " : i % 3 == 0 ? "word" : "\U0001F600";
  std::string joined;
  for (const std::string& word : split(text)) joined += word;
  EXPECT_EQ(joined, text);
}

}  // namespace
}  // namespace clusterfusion
