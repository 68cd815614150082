#include "cli/token_text.hpp"

#include <gtest/gtest.h>

namespace clusterfusion::cli {
namespace {

TEST(FirstIllFormedByte, FindsWhatUnicodeForbids) {
  EXPECT_EQ(first_ill_formed_byte(""), std::nullopt);
  EXPECT_EQ(first_ill_formed_byte("plain, \xc3\xa9, \xe2\x82\xac, \xf0\x9f\x98\x80"), std::nullopt);
  EXPECT_EQ(first_ill_formed_byte(std::string_view("a\0b", 3)), std::nullopt);
  EXPECT_EQ(first_ill_formed_byte("ab\xff"), 2u);
  EXPECT_EQ(first_ill_formed_byte("\x80"), 0u);
  EXPECT_EQ(first_ill_formed_byte("a\xc3"), 1u);              // cut off
  EXPECT_EQ(first_ill_formed_byte("a\xc0\xaf"), 1u);          // overlong
  EXPECT_EQ(first_ill_formed_byte("a\xed\xa0\x80"), 1u);      // surrogate
  EXPECT_EQ(first_ill_formed_byte("a\xf4\x90\x80\x80"), 1u);  // above U+10FFFF
}

TEST(Quote, IsOnePrintableLine) {
  EXPECT_EQ(quote(""), R"("")");
  EXPECT_EQ(quote(" caf\xc3\xa9"), "\" caf\xc3\xa9\"");
  EXPECT_EQ(quote("a\n\t\r\"\\"), R"("a\n\t\r\"\\")");
  EXPECT_EQ(quote(std::string_view("\0\x1b[2J\x7f", 6)), R"("\x00\x1b[2J\x7f")");
  EXPECT_EQ(quote("\xc2\x85\xe2\x80\xae"), R"("\u0085\u202e")");  // next line, override
  EXPECT_EQ(quote("\xf3\xa0\x80\x81"), R"("\U000e0001")");        // language tag
}

TEST(Quote, ShowsBytesThatAreNoText) {
  EXPECT_EQ(quote("\xe2\x82"), R"("\xe2\x82")");
  EXPECT_EQ(quote("a\xff\xc3\xa9"), "\"a\\xff\xc3\xa9\"");
}

}  // namespace
}  // namespace clusterfusion::cli
