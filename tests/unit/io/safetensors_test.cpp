#include "io/safetensors.hpp"

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "io/file_fixtures.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;
using test::safetensors_file;
using test::safetensors_head;

std::vector<TensorEntry> parse(std::string_view file) {
  return parse_safetensors(std::as_bytes(std::span(file)), "m.safetensors");
}

std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

void expect_tensors(const std::string& file, const nlohmann::json& expected) {
  const std::vector<TensorEntry> tensors = parse(file);
  EXPECT_EQ(tensors.size(), expected.size());
  for (const TensorEntry& tensor : tensors) {
    ASSERT_TRUE(expected.contains(tensor.name)) << tensor.name;
    const nlohmann::json& reference = expected[tensor.name];
    EXPECT_EQ(tensor.dtype, reference["dtype"].get<std::string>());
    EXPECT_EQ(tensor.shape, reference["shape"].get<std::vector<std::int64_t>>());
    EXPECT_EQ(file.substr(tensor.begin, tensor.end - tensor.begin),
              from_hex(reference["data"].get<std::string>()));
  }
}

// data/safetensors_cases.json: what the reference implementation made of the same files.
TEST(ParseSafetensors, AcceptsAndReadsWhatTheReferenceDoes) {
  std::ifstream recording(CF_SOURCE_DIR "/tests/unit/io/data/safetensors_cases.json");
  const nlohmann::json cases = nlohmann::json::parse(recording)["cases"];
  int accepted = 0;
  for (const nlohmann::json& recorded : cases) {
    SCOPED_TRACE(recorded["name"].get<std::string>());
    const std::string file = from_hex(recorded["file"].get<std::string>());
    if (recorded.contains("tensors")) {
      ++accepted;
      EXPECT_NO_THROW(expect_tensors(file, recorded["tensors"]));
    } else {
      EXPECT_THROW(parse(file), Error) << recorded["error"];
    }
  }
  EXPECT_GT(accepted, 50);
  EXPECT_GT(static_cast<int>(cases.size()) - accepted, 100);
}

TEST(ParseSafetensors, GivesTensorsInTheOrderOfTheirBytes) {
  const auto tensors = parse(safetensors_file({{"z", "F16", {2}, "abcd"}, {"a", "I8", {1}, "e"}}));
  ASSERT_EQ(tensors.size(), 2U);
  EXPECT_EQ(tensors[0].name, "z");
  EXPECT_EQ(tensors[1].name, "a");
  EXPECT_EQ(tensors[0].begin % 8, 0U);
}

void expect_malformed(const std::vector<std::string>& words, const std::string& header,
                      std::size_t data_bytes) {
  std::vector<std::string> all = words;
  all.push_back("m.safetensors");
  expect_error(ErrorKind::malformed, all,
               [&] { parse(safetensors_head(header) + std::string(data_bytes, '\0')); });
}

TEST(ParseSafetensors, SaysWhatIsWrongWithTheLength) {
  expect_error(ErrorKind::malformed, {"m.safetensors", "found 3 bytes", "8"},
               [&] { parse("abc"); });
  expect_error(ErrorKind::malformed, {"at most 100000000", "found 100000001"},
               [&] { parse(std::string("\x01\xe1\xf5\x05\0\0\0\0{}", 10)); });
  expect_error(ErrorKind::malformed, {"truncated", "20 bytes", "only 2"},
               [&] { parse(std::string("\x14\0\0\0\0\0\0\0{}", 10)); });
}

TEST(ParseSafetensors, SaysWhatIsWrongWithATensor) {
  const auto one = [](const std::string& entry) { return "{\"w.x\": " + entry + "}"; };
  expect_malformed({"\"w.x\"", "\"dtype\""}, one(R"({"shape": [2], "data_offsets": [0, 4]})"), 4);
  expect_malformed({"\"w.x\"", "\"shape\"[1]", "found -2"},
                   one(R"({"dtype": "F16", "shape": [1, -2], "data_offsets": [0, 4]})"), 4);
  expect_malformed({"\"w.x\"", "[2, 3] of F16 takes 12 bytes", "[0, 10] hold 10"},
                   one(R"({"dtype": "F16", "shape": [2, 3], "data_offsets": [0, 10]})"), 10);
  expect_malformed({"\"w.x\"", "[4294967296, 4294967296]", "64 bits"},
                   one(R"({"dtype": "I8", "shape": [4294967296, 4294967296],
                           "data_offsets": [0, 0]})"),
                   0);
  expect_malformed({"\"w.x\"", "begin <= end", "found [4,0]"},
                   one(R"({"dtype": "F16", "shape": [2], "data_offsets": [4, 0]})"), 4);
  expect_malformed({"\"w.x\"", "must be an object", "found 3"}, one("3"), 0);
  expect_malformed({"\"w.x\"", "twice"}, R"({"w.x": {"dtype": "I8", "shape": [], "data_offsets":
                   [0, 1]}, "w.x": {"dtype": "I8", "shape": [], "data_offsets": [0, 1]}})",
                   1);
  expect_malformed({"\"__metadata__\": \"k\"", "a string", "found 1"},
                   R"({"__metadata__": {"k": 1}})", 0);
  expect_malformed({"header", "line 1, column 2"}, "{]", 0);
  expect_error(ErrorKind::unsupported, {"m.safetensors", "\"w.x\"", "\"Q4_K\""}, [&] {
    parse(safetensors_head(one(R"({"dtype": "Q4_K", "shape": [], "data_offsets": [0, 0]})")));
  });
}

std::string two_tensors(int a_begin, int a_end, int b_begin, int b_end) {
  const nlohmann::json header = {
      {"a", {{"dtype", "I8"}, {"shape", {a_end - a_begin}}, {"data_offsets", {a_begin, a_end}}}},
      {"b", {{"dtype", "I8"}, {"shape", {b_end - b_begin}}, {"data_offsets", {b_begin, b_end}}}}};
  return header.dump();
}

TEST(ParseSafetensors, SaysWhereTensorsDoNotCoverTheData) {
  EXPECT_EQ(parse(safetensors_head(two_tensors(0, 4, 4, 6)) + "123456").size(), 2U);
  expect_malformed({"\"a\"", "\"b\"", "overlap", "byte 4", "begins at 3"}, two_tensors(0, 4, 3, 6),
                   6);
  expect_malformed({"hole of 1 bytes before tensor \"b\"", "found 5"}, two_tensors(0, 4, 5, 6), 6);
  expect_malformed({"hole of 2 bytes before tensor \"a\""}, two_tensors(2, 4, 4, 6), 6);
  expect_malformed({"oversized", "take 6 bytes, but 7"}, two_tensors(0, 4, 4, 6), 7);
  expect_malformed({"truncated", "tensor \"b\"", "byte 6", "only 5"}, two_tensors(0, 4, 4, 6), 5);
}

}  // namespace
}  // namespace clusterfusion
