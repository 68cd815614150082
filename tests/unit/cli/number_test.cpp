#include "cli/number.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "clusterfusion/error.hpp"

namespace clusterfusion::cli {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

TEST(ParseNumber, TakesWholeDecimalTextsOnly) {
  EXPECT_EQ(parse_number<int>("010"), 10);
  EXPECT_EQ(parse_number<int>("-7"), -7);
  EXPECT_EQ(parse_number<std::uint64_t>("18446744073709551615"), 18446744073709551615u);
  EXPECT_EQ(parse_number<float>("1e-3"), 1e-3f);
  for (const char* text : {"", " 1", "1 ", "1x", "0x1f", "+1", "1.5", "99999999999", "nan"}) {
    EXPECT_EQ(parse_number<int>(text), std::nullopt) << text;
  }
  for (const char* text : {"", "nan", "inf", "-inf", "1e99", "1,5", "0x1p3"}) {
    EXPECT_EQ(parse_number<float>(text), std::nullopt) << text;
  }
  EXPECT_EQ(parse_number<std::uint64_t>("-1"), std::nullopt);
}

// Parses "--n TEXT" with an option in [1, 20]; returns the message of the error, or "".
std::string error_of(const std::string& text, int& value) {
  CLI::App app;
  add_number(app, "--n", value, "a number", 1, 20);
  try {
    app.parse(std::vector<std::string>{text, "--n"});  // CLI11 wants the last argument first
  } catch (const CLI::ParseError& error) {
    return error.what();
  }
  return "";
}

TEST(AddNumber, ReadsDecimalAndChecksTheRange) {
  int value = 0;
  EXPECT_EQ(error_of("010", value), "");
  EXPECT_EQ(value, 10);
  EXPECT_EQ(error_of("0", value), "--n: expected a whole number from 1 to 20, found \"0\"");
  EXPECT_EQ(error_of("-3", value), "--n: expected a whole number from 1 to 20, found \"-3\"");
  EXPECT_EQ(error_of("many", value), "--n: expected a whole number from 1 to 20, found \"many\"");
  EXPECT_EQ(value, 10);
}

TEST(AddNumber, KeepsEveryDigitOfAFloat) {
  CLI::App app;
  float value = 0;
  add_number(app, "--x", value, "a number");
  app.parse(std::vector<std::string>{"0.1", "--x"});
  EXPECT_EQ(value, 0.1f);
  EXPECT_THROW(app.parse(std::vector<std::string>{"nan", "--x"}), CLI::ValidationError);
}

TEST(ParseIntegerList, TakesCommasWhiteSpaceAndBrackets) {
  const auto parse = [](std::string_view text) { return parse_integer_list(text, 0, 100, "LIST"); };
  EXPECT_THAT(parse("1,2,3"), ElementsAre(1, 2, 3));
  EXPECT_THAT(parse(" 1 2\n3\n"), ElementsAre(1, 2, 3));
  EXPECT_THAT(parse("[1, 2, 3]\n"), ElementsAre(1, 2, 3));
  EXPECT_THAT(parse("007"), ElementsAre(7));
  EXPECT_THAT(parse(""), IsEmpty());
  EXPECT_THAT(parse(" [ ] "), IsEmpty());
}

TEST(ParseIntegerList, NamesTheEntryThatIsWrong) {
  const auto message = [](std::string_view text) -> std::string {
    try {
      parse_integer_list(text, 1, 100, "--contexts");
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::invalid_argument);
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message("16,abc"),
            "--contexts: entry 1 is \"abc\"; expected a whole number from 1 to 100");
  EXPECT_THAT(message("0"), HasSubstr("entry 0 is \"0\""));
  EXPECT_THAT(message("1 2 101"), HasSubstr("entry 2 is \"101\""));
  EXPECT_THAT(message("1.5"), HasSubstr("\"1.5\""));
  EXPECT_THAT(message("99999999999999999999"), HasSubstr("\"99999999999999999999\""));
  EXPECT_THAT(message("[1"), HasSubstr("\"[1\""));
}

}  // namespace
}  // namespace clusterfusion::cli
