#include "io/json.hpp"

#include <string>

#include "io/file_fixtures.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;

TEST(JsonDocument, ReadsEveryKindOfValue) {
  const JsonDocument document(
      R"({"i": -3, "n": 1.5, "t": true, "s": "a\u00e9\n", "l": [1, 2], "o": {"x": null}})", "file");
  const JsonObject root(document.root());
  EXPECT_EQ(root.at("i").integer({-5, 5}), -3);
  EXPECT_EQ(root.at("n").number(), 1.5);
  EXPECT_EQ(root.at("i").number({-5, 5}), -3.0);
  EXPECT_TRUE(root.at("t").boolean());
  EXPECT_EQ(root.at("s").string(), "aé\n");
  ASSERT_EQ(root.at("l").array().size(), 2U);
  EXPECT_EQ(root.at("l").array()[1].integer(), 2);
  const JsonObject inner(root.at("o"));
  EXPECT_TRUE(inner.find("x").has_value());
  EXPECT_FALSE(inner.find_non_null("x").has_value());
  EXPECT_FALSE(inner.find("y").has_value());
  EXPECT_EQ(root.members().size(), 6U);
}

// As transformers writes the length limit of a tokenizer that has none.
TEST(JsonDocument, ReadsIntegersOfAnyLength) {
  const JsonDocument document(
      R"({"n": 1000000000000000019884624838656, "m": -9223372036854775809, "s": "12345678901234567890\\\"",
          "f": 12345678901234567890.5e-3, "l": [99999999999999999999], "i": 7})",
      "file");
  const JsonObject root(document.root());
  EXPECT_EQ(root.at("n").number({0, 1e31}), 1e30);
  EXPECT_EQ(root.at("m").number({-1e20, 0}), -9223372036854775809.0);
  EXPECT_EQ(root.at("s").string(), "12345678901234567890\\\"");
  EXPECT_EQ(root.at("f").number(), 12345678901234567.8905);
  EXPECT_EQ(root.at("l").array()[0].number(), 1e20);
  EXPECT_EQ(root.at("i").integer(), 7);
  expect_error(ErrorKind::malformed, {"file: \"n\" must be an integer"},
               [&] { root.at("n").integer(); });
}

TEST(JsonDocument, SaysWhereJsonIsBroken) {
  const auto parse = [](std::string_view text) { JsonDocument(text, "dir/config.json"); };
  expect_error(ErrorKind::malformed, {"dir/config.json", "line 3, column 7"},
               [&] { parse("{\n \"a\": 1,\n \"b\": }\n"); });
  expect_error(ErrorKind::malformed, {"dir/config.json", "line 1, column 11"},
               [&] { parse("{\"a\": 1 \"b\": 2}"); });
  expect_error(ErrorKind::malformed, {"dir/config.json", "line 2", "end of input"},
               [&] { parse("{\"a\":\n [1, 2"); });
  expect_error(ErrorKind::malformed, {"line 1", "byte 0", "end of input"}, [&] { parse(""); });
  expect_error(ErrorKind::malformed, {"line 1, column 8", "UTF-8"},
               [&] { parse("{\"a\": \"\xff\"}"); });
  expect_error(ErrorKind::malformed, {"line 1"}, [&] { parse("{\"a\": NaN}"); });
  expect_error(ErrorKind::malformed, {"dir/config.json"}, [&] { parse("{\"a\": 1e999}"); });
  expect_error(ErrorKind::malformed, {"dir/config.json"}, [&] { parse("{\"a\": 1} x"); });
  expect_error(ErrorKind::malformed, {"dir/config.json"},
               [&] { parse(std::string(100'000, '[') + std::string(100'000, ']')); });
}

TEST(JsonObject, RefusesAKeyThatStandsThereTwice) {
  const JsonDocument document(R"({"b": 1, "a": {"k": 1, "j": 2, "k": 3}})", "file");
  const JsonObject root(document.root());
  expect_error(ErrorKind::malformed, {"file: \"a\"", "\"k\"", "twice"},
               [&] { JsonObject(root.at("a")); });
}

TEST(JsonValue, NamesFileKeyExpectedAndFound) {
  const JsonDocument document(
      R"({"size": "32", "part": 3.5, "list": [1, -1], "flag": null, "big": 18446744073709551615})",
      "config.json");
  const JsonObject root(document.root());
  expect_error(ErrorKind::malformed,
               {"config.json: \"size\" must be an integer from 1 to 9, found \"32\""}, [&] {
                 root.at("size").integer({1, 9});
               });
  expect_error(ErrorKind::malformed, {"\"part\"", "integer", "found 3.5"},
               [&] { root.at("part").integer(); });
  expect_error(ErrorKind::malformed, {"\"part\"", "a number from 0 to 1, found 3.5"}, [&] {
    root.at("part").number({0, 1});
  });
  expect_error(ErrorKind::malformed, {"\"list\"[1]", "from 0 to 5", "found -1"}, [&] {
    root.at("list").array()[1].integer({0, 5});
  });
  expect_error(ErrorKind::malformed, {"\"flag\" must be true or false, found null"},
               [&] { root.at("flag").boolean(); });
  expect_error(ErrorKind::malformed, {"\"list\" must be a string, found [1,-1]"},
               [&] { root.at("list").string(); });
  expect_error(ErrorKind::malformed, {"\"size\" must be a list, found"},
               [&] { root.at("size").array(); });
  expect_error(ErrorKind::malformed, {"\"size\" must be an object"},
               [&] { JsonObject(root.at("size")); });
  expect_error(ErrorKind::malformed, {"\"big\"", "found 18446744073709551615"},
               [&] { root.at("big").integer(); });
  expect_error(ErrorKind::malformed, {"config.json has no key \"absent\""},
               [&] { root.at("absent"); });
}

TEST(JsonValue, ShortensWhatItFound) {
  std::string text = "[\"";
  for (int i = 0; i < 1000; ++i) text += "é";
  const JsonDocument document(text + "\"]", "file");
  try {
    static_cast<void>(document.root().integer());
    FAIL() << "no error";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_LT(message.size(), 300U);
    EXPECT_TRUE(simdjson::validate_utf8(message));
    EXPECT_TRUE(message.ends_with("é..."));
  }
}

TEST(JsonDocument, TakesAByteOrderMarkAndNamesUtf16) {
  const JsonDocument document("\xEF\xBB\xBF{\"a\": 1}", "file");
  EXPECT_EQ(JsonObject(document.root()).at("a").integer(), 1);
  for (const std::string& text :
       {std::string("\xFF\xFE{\0}\0", 6), std::string("\xFE\xFF\0{\0}", 6)}) {
    expect_error(ErrorKind::malformed, {"file is UTF-16", "save it as UTF-8"},
                 [&] { JsonDocument(text, "file"); });
  }
}

TEST(Quote, EscapesAndShortens) {
  EXPECT_EQ(quote("a.b"), "\"a.b\"");
  EXPECT_EQ(quote("a\"\n\x01"), "\"a\\\"\\n\\u0001\"");
  EXPECT_EQ(quote(std::string(1000, 'x')), "\"" + std::string(200, 'x') + "...\"");
  EXPECT_TRUE(simdjson::validate_utf8(quote("\xff\xfe")));
}

}  // namespace
}  // namespace clusterfusion
