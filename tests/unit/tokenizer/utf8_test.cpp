// Expected texts are those of Python 3.11: bytes.decode("utf-8", errors="replace").
#include "tokenizer/utf8.hpp"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

namespace clusterfusion {
namespace {

using namespace std::string_literals;

std::string repaired(std::string_view text) {
  std::string out;
  EXPECT_EQ(append_repaired(text, true, out), text.size());
  return out;
}

// U+FFFD for each "?".
std::string with_replacements(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '?') {
      out += kReplacementCharacter;
    } else {
      out += c;
    }
  }
  return out;
}

TEST(Utf8, RepairsAsPythonDoes) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", ""},
      {"plain", "plain"},
      {"\0z"s, "\0z"s},
      {"é東😀", "é東😀"},
      {"\x80", "?"},
      {"\xC0\xAF", "??"},
      {"\xE0\x80\x80", "???"},
      {"\xED\xA0\x80", "???"},
      {"\xF4\x90\x80\x80", "????"},
      {"\xF0\x9F\x98", "?"},
      {"\xF0\x9F\x98z", "?z"},
      {"a\xE2\x82", "a?"},
      {"\xE2\x82\xE2\x82\xAC", "?€"},
      {"\xF0\x80\x80\x41", "???A"},
      {"\xF5\x80", "??"},
      {"\xFE\xFF", "??"},
      {"\xC3", "?"},
      {"\xC3\xC3\xA9", "?é"},
  };
  for (const auto& [text, expected] : cases) {
    EXPECT_EQ(repaired(text), with_replacements(expected)) << text;
  }
}

TEST(Utf8, LeavesOnlyUnfinishedCharactersWhenNotFinal) {
  const std::string text = "a\xFF\xF0\x9F\x98";
  std::string out;
  EXPECT_EQ(append_repaired(text, false, out), 2u);
  EXPECT_EQ(out, with_replacements("a?"));
}

// Unicode, table 3-6.
std::string encoded(char32_t c) {
  const auto continuation = [c](int shift) { return static_cast<char>(0x80 | (c >> shift & 63)); };
  std::string text;
  if (c < 0x80) {
    text += static_cast<char>(c);
  } else if (c < 0x800) {
    text += static_cast<char>(0xC0 | c >> 6);
  } else if (c < 0x10000) {
    text += static_cast<char>(0xE0 | c >> 12);
    text += continuation(6);
  } else {
    text += static_cast<char>(0xF0 | c >> 18);
    text += continuation(12);
    text += continuation(6);
  }
  if (c >= 0x80) text += continuation(0);
  return text;
}

TEST(Utf8, DecodesEveryCodePoint) {
  for (char32_t c = 1; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    const std::string text = encoded(c);
    const Utf8Step step = next_utf8(text);
    ASSERT_EQ(step.status, Utf8Status::complete) << static_cast<std::uint32_t>(c);
    ASSERT_EQ(step.length, text.size());
    ASSERT_EQ(step.code_point, c);
    std::size_t length = 0;
    ASSERT_EQ(decode_last_valid(text, length), c);
    ASSERT_EQ(length, text.size());
  }
}

}  // namespace
}  // namespace clusterfusion
