#include "tokenizer/regex.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "clusterfusion/error.hpp"

namespace clusterfusion {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// The pieces that tokenizers' Split of behavior "isolated" gives, which the expectations are.
std::vector<std::string> split(const std::string& pattern, const std::string& text) {
  std::vector<std::string> pieces;
  for (const TextPart& part : Regex(pattern, "f").find_all(text)) {
    if (part.begin < part.end) pieces.push_back(text.substr(part.begin, part.end - part.begin));
  }
  return pieces;
}

TEST(Regex, FindsWhatTokenizersFinds) {
  EXPECT_THAT(split("a{1,2}", "xaaab"), ElementsAre("x", "aa", "a", "b"));
  EXPECT_THAT(split("[a-c&&[^b]]+", "abcab"), ElementsAre("a", "b", "ca", "b"));
  EXPECT_THAT(split("(?<=a)b|^c$", "ab\nc\nbc"), ElementsAre("a", "b", "\n", "c", "\nbc"));
  EXPECT_THAT(split("\\p{^Lu}+", "ab\u00C9\u00E9Z"), ElementsAre("ab", "\u00C9", "\u00E9", "Z"));
  EXPECT_THAT(split("(?i)'S", "'s'\u017F'x"), ElementsAre("'s", "'\u017F", "'x"));
  EXPECT_THAT(split("\\bb\\w*+", "ab bc-b"), ElementsAre("ab ", "bc", "-", "b"));
  EXPECT_THAT(split("\\x{41}|\\u00e9|\\n", "xA\u00E9\n"), ElementsAre("x", "A", "\u00E9", "\n"));
  EXPECT_THAT(split("a*?", "baa"), ElementsAre("b", "a", "a"));
  EXPECT_THAT(split("a++b|a", "aab a"), ElementsAre("aab", " ", "a"));
  EXPECT_THAT(split("[^\\s\\S]", "ab"), ElementsAre("ab"));
  EXPECT_THAT(split("1*(?:23)?+[a1]", "1_"), ElementsAre("1", "_"));
  EXPECT_THAT(split("\\w", "\u00B2a"), ElementsAre("\u00B2", "a"));
  EXPECT_THAT(split("[\\w]", "\u00B2-a"), ElementsAre("\u00B2-", "a"));
}

TEST(Regex, RefusesWhatOnigurumaReadsInAnotherWay) {
  for (const char* pattern :
       {"a{1,2}+", "a{2}?",      "a{,3}",    "a**",       "(?<n>a)", "(a)\\1",
        "(?i)ss",  "(?i)\u00E9", "\\h",      "(?m:.)",    "[]a]",    "[[:alpha:]]",
        "[a-\\d]", "\\p{Han}",   "a(?i)b|c", "(",         ")",       "[a",
        "*a",      "\\xff",      "{",        "\\",        "(?=a)+",  "a{70000}",
        "(?~a)",   "(?>a)",      "(a*)+",    "(a|b?){2}", "(^)*",    "[b-a]"}) {
    try {
      Regex(pattern, "f");
      ADD_FAILURE() << "accepted: " << pattern;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::unsupported) << pattern;
      EXPECT_THAT(error.what(), HasSubstr("f is ")) << pattern;
    }
  }
}

TEST(Regex, RefusesWhatPcre2CannotCompile) {
  for (const std::string& pattern :
       {std::string("(?<=a+)b"), "(?:" + std::string(3, '(') + "a{1000}){1000}){1000}){1000})"}) {
    EXPECT_THROW(Regex(pattern, "f"), Error) << pattern;
  }
}

// Expressions of a hostile file end, with an error.
TEST(Regex, EndsWhereItWouldBacktrackForYears) {
  for (const char* pattern : {"(a+)+$", "(a|a)*$", "(?:aa|a)+$"}) {
    try {
      (void)Regex(pattern, "f").find_all(std::string(60, 'a') + "c");
      ADD_FAILURE() << "found nothing in time: " << pattern;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::unsupported);
      EXPECT_THAT(error.what(), HasSubstr("takes too long for a text of 61 characters"));
    }
  }
}

// Each match alone is quick, and there are many.
TEST(Regex, EndsWhereMatchesAddUp) {
  EXPECT_THROW((void)Regex("a*b|a", "f").find_all(std::string(200'000, 'a')), Error);
}

TEST(Regex, TakesLongTexts) {
  const std::string text(4 << 20, ' ');
  EXPECT_EQ(Regex("\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+", "f").find_all(text).size(), 1u);
  EXPECT_EQ(Regex("(?:a|b)+", "f").find_all(std::string(1 << 19, 'a')).size(), 1u);
}

}  // namespace
}  // namespace clusterfusion
