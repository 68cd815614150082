#include "engine/text_stream.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "engine/fixtures.hpp"

namespace clusterfusion {
namespace {

// What the filter lets through when `text` comes in pieces that end at `cuts`.
std::string filtered(const std::string& text, const std::vector<std::string>& stops,
                     const std::vector<std::size_t>& cuts, bool& stopped) {
  StopFilter filter(stops);
  std::string out;
  std::size_t begin = 0;
  for (const std::size_t cut : cuts) {
    out += filter.push(text.substr(begin, cut - begin));
    begin = cut;
  }
  out += filter.push(text.substr(begin));
  out += filter.finish();
  stopped = filter.stopped();
  return out;
}

TEST(StopFilter, EndsBeforeTheLeftmostStopStringHoweverTheTextIsCut) {
  std::mt19937 random(5);
  const auto random_text = [&](std::size_t shortest, std::size_t longest) {
    std::string text(shortest + random() % (longest - shortest + 1), ' ');
    for (char& c : text) c = "abc"[random() % 3];
    return text;
  };
  for (int round = 0; round < 20'000; ++round) {
    const std::string text = random_text(0, 12);
    std::vector<std::string> stops(1 + random() % 3);
    for (std::string& stop : stops) stop = random_text(1, 4);
    std::vector<std::size_t> cuts(random() % 6);
    for (std::size_t& cut : cuts) cut = random() % (text.size() + 1);
    std::sort(cuts.begin(), cuts.end());

    std::size_t expected = text.size();
    for (const std::string& stop : stops) expected = std::min(expected, text.find(stop));
    bool stopped = false;
    ASSERT_EQ(filtered(text, stops, cuts, stopped), text.substr(0, expected)) << text;
    ASSERT_EQ(stopped, expected < text.size());
  }
}

// Some bytes are not shown. A stop string counts in the text with them and in the text without.
TEST(StopFilter, FindsStopStringsAcrossHiddenPieces) {
  std::mt19937 random(7);
  const auto random_text = [&](std::size_t shortest, std::size_t longest) {
    std::string text(shortest + random() % (longest - shortest + 1), ' ');
    for (char& c : text) c = "abc"[random() % 3];
    return text;
  };
  const auto shown_before = [](const std::vector<std::pair<std::string, bool>>& pieces,
                               std::size_t end) {
    std::string shown;
    std::size_t at = 0;
    for (const auto& [piece, hidden] : pieces) {
      for (const char c : piece) {
        if (at++ < end && !hidden) shown += c;
      }
    }
    return shown;
  };
  for (int round = 0; round < 20'000; ++round) {
    std::vector<std::pair<std::string, bool>> pieces(random() % 5);
    std::string whole;
    std::string shown;
    std::vector<std::size_t> places;
    for (auto& [piece, hidden] : pieces) {
      piece = random_text(0, 4);
      hidden = random() % 2 == 0;
      for (const char c : piece) {
        if (!hidden) places.push_back(whole.size());
        if (!hidden) shown += c;
        whole += c;
      }
    }
    const std::vector<std::string> stops{random_text(1, 4), random_text(1, 4)};
    std::size_t end = whole.size();
    for (const std::string& stop : stops) {
      end = std::min(end, whole.find(stop));
      if (shown.find(stop) != shown.npos) end = std::min(end, places[shown.find(stop)]);
    }
    StopFilter filter(stops);
    std::string out;
    for (const auto& [piece, hidden] : pieces) {
      out += hidden ? filter.push_hidden(piece) : filter.push(piece);
    }
    out += filter.finish();
    ASSERT_EQ(out, shown_before(pieces, end)) << whole << " shown as " << shown;
    ASSERT_EQ(filter.stopped(), end < whole.size());
  }
}

TEST(StopFilter, HoldsBackOnlyWhatMayBeAStopString) {
  StopFilter filter({"STOP"});
  EXPECT_EQ(filter.push("say S"), "say ");
  EXPECT_EQ(filter.push("T"), "");
  EXPECT_EQ(filter.push("ART ST"), "START ");
  EXPECT_EQ(filter.push("STO"), "ST");
  EXPECT_FALSE(filter.stopped());
  EXPECT_EQ(filter.push("P it"), "");
  EXPECT_TRUE(filter.stopped());
  EXPECT_EQ(filter.push("more"), "");
  EXPECT_EQ(filter.finish(), "");
}

TEST(StopFilter, WithoutStopStringsLetsAllThrough) {
  StopFilter filter({});
  EXPECT_EQ(filter.push("abc"), "abc");
  EXPECT_EQ(filter.finish(), "");
  EXPECT_FALSE(filter.stopped());
}

TEST(TextStream, EqualsDecodeOfRandomTokens) {
  std::mt19937 random(6);
  const auto tokenizer = test::byte_tokenizer();
  for (int round = 0; round < 2000; ++round) {
    const bool skip_special_tokens = round % 2 == 0;
    std::vector<TokenId> tokens(random() % 20);
    for (TokenId& token : tokens) token = static_cast<TokenId>(random() % (test::kLast + 1));
    TextStream stream(tokenizer, skip_special_tokens, {});
    std::string text;
    for (const TokenId token : tokens) text += stream.push(token);
    text += stream.finish();
    ASSERT_EQ(text, tokenizer->decode(tokens, skip_special_tokens));
  }
}

TEST(TextStream, HoldsBackUnfinishedCharacters) {
  TextStream stream(test::byte_tokenizer(), true, {});
  EXPECT_EQ(stream.push(1 + 0xE2), "");
  EXPECT_EQ(stream.push(1 + 0x82), "");
  EXPECT_EQ(stream.push(1 + 0xAC), "€");
  EXPECT_EQ(stream.push(1 + 0xE2), "");
  EXPECT_EQ(stream.finish(), "\uFFFD");
}

TEST(TextStream, TokensWithoutTextAddNone) {
  TextStream stream(test::byte_tokenizer(), true, {});
  EXPECT_EQ(stream.push(test::kThe), " the");
  EXPECT_EQ(stream.push(test::kPadded), "");
  EXPECT_EQ(stream.push(test::kLast), "abcd");

  TextStream silent(nullptr, true, {});
  EXPECT_EQ(silent.push(test::kThe), "");
  EXPECT_EQ(silent.finish(), "");
}

}  // namespace
}  // namespace clusterfusion
