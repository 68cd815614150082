// Expected forms are from the Unicode standard (UAX #15 and NormalizationTest.txt).
#include "tokenizer/nfc.hpp"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace clusterfusion {
namespace {

std::string nfc(const std::string& text) { return to_nfc(text).value_or(text); }

TEST(Nfc, Normalizes) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", ""},
      {"plain ASCII", "plain ASCII"},
      {"e\u0301", "\u00E9"},
      {"xe\u0301 y", "x\u00E9 y"},
      {"\u212B", "\u00C5"},              // singleton
      {"\u0958", "\u0915\u093C"},        // composition exclusion
      {"\u1E9B\u0323", "\u1E9B\u0323"},  // UAX #15, figure 6
      {"e\u0302\u0323", "\u1EC7"},       // order of marks
      {"\u00EA\u0323", "\u1EC7"},        // a composite taken apart again
      {"a\u0315\u0300\u05AE\u0345b", "\u00E0\u05AE\u0315\u0345b"},
      {"\u1100\u1161\u11A8", "\uAC01"},  // Hangul
      {"\uAC00\u11A8", "\uAC01"},
      {"\u0301\u0323", "\u0323\u0301"},  // marks with nothing before them
      {"\U00011099\U000110BA", "\U0001109A"},
      {"\U0001D15E", "\U0001D157\U0001D165"},
  };
  for (const auto& [text, expected] : cases) EXPECT_EQ(nfc(text), expected) << text;
}

TEST(Nfc, LeavesNewerCharactersAlone) {
  // U+11935 U+11930 compose since Unicode 13, which tokenizers' normalizer does not know.
  EXPECT_EQ(nfc("\U00011935\U00011930"), "\U00011935\U00011930");
  // U+0898 has been a mark since Unicode 14; to tokenizers it is nothing that is moved.
  EXPECT_EQ(nfc("e\u0898\u0301"), "e\u0898\u0301");
}

TEST(Nfc, SaysNothingAboutTextThatNeedsNothing) {
  EXPECT_FALSE(to_nfc("na\u00EFve \u2014 \u6771\u4EAC \U0001F600").has_value());
}

TEST(Nfc, TakesLongRunsOfMarksInOrder) {
  constexpr int kPairs = 50000;
  std::string text = "q", expected = "q";
  for (int i = 0; i < kPairs; ++i) text += "\u0301\u0323";
  for (int i = 0; i < kPairs; ++i) expected += "\u0323";
  for (int i = 0; i < kPairs; ++i) expected += "\u0301";
  EXPECT_EQ(nfc(text), expected);
}

}  // namespace
}  // namespace clusterfusion
