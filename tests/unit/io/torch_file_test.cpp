#include "io/torch_file.hpp"

#include <fmt/format.h>

#include <string>

#include "io/torch_fixtures.hpp"

namespace clusterfusion {
namespace {

namespace pickled = test::pickled;
using test::expect_error;
using test::torch_parts;
using test::zip_file;
using test::ZipPart;

std::vector<TensorEntry> parse(const std::string& file) {
  return parse_torch_file(std::as_bytes(std::span(file)), "m.bin");
}

std::string read_whole(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string hex(const std::string& bytes) {
  std::string text;
  for (const char byte : bytes) text += fmt::format("{:02x}", static_cast<unsigned char>(byte));
  return text;
}

const std::filesystem::path kFolder = CF_SOURCE_DIR "/tests/unit/io/data/torch";

nlohmann::json recorded() {
  std::ifstream recording(kFolder / "cases.json");
  return nlohmann::json::parse(recording);
}

// data/torch: files that torch.save wrote, and what torch.load made of them.
TEST(TorchFile, ReadsWhatTorchReads) {
  const nlohmann::json cases = recorded();
  EXPECT_GE(cases["read"].size(), 11U);
  for (const auto& [name, tensors] : cases["read"].items()) {
    SCOPED_TRACE(name);
    const std::string file = read_whole(kFolder / (name + ".bin"));
    const std::vector<TensorEntry> entries = parse(file);
    EXPECT_EQ(entries.size(), tensors.size());
    for (const TensorEntry& entry : entries) {
      SCOPED_TRACE(entry.name);
      ASSERT_TRUE(tensors.contains(entry.name));
      const nlohmann::json& expected = tensors[entry.name];
      EXPECT_EQ(entry.dtype, expected["dtype"].get<std::string>());
      EXPECT_EQ(entry.shape, expected["shape"].get<std::vector<std::int64_t>>());
      if (expected.contains("bytes")) {
        EXPECT_TRUE(entry.strides.empty());
        EXPECT_EQ(hex(file.substr(entry.begin, entry.end - entry.begin)),
                  expected["bytes"].get<std::string>());
      } else {
        EXPECT_EQ(entry.strides, expected["strides"].get<std::vector<std::int64_t>>());
      }
    }
  }
}

TEST(TorchFile, RefusesByNameWhatElseTorchSaves) {
  const nlohmann::json cases = recorded();
  EXPECT_GE(cases["refused"].size(), 12U);
  for (const auto& [name, word] : cases["refused"].items()) {
    SCOPED_TRACE(name);
    const std::string file = read_whole(kFolder / (name + ".bin"));
    expect_error(ErrorKind::unsupported, {"m.bin", word.get<std::string>()}, [&] { parse(file); });
  }
}

TEST(TorchFile, SharesStorages) {
  const std::vector<TensorEntry> tied = parse(read_whole(kFolder / "tied.bin"));
  ASSERT_EQ(tied.size(), 2U);
  EXPECT_EQ(tied[0].begin, tied[1].begin);
  EXPECT_EQ(tied[0].end, tied[1].end);
}

TEST(TorchFile, GivesTheConversionOfOldFiles) {
  const std::string file = read_whole(kFolder / "legacy.bin");
  expect_error(ErrorKind::unsupported,
               {"m.bin: ", "python -c", "f = 'm.bin'", "torch.load(f", "weights_only=True"},
               [&] { parse(file); });
}

TEST(TorchFile, RefusesEveryTruncation) {
  const std::string file = read_whole(kFolder / "state_dict.bin");
  for (std::size_t size = 0; size < file.size(); ++size) {
    expect_error(ErrorKind::malformed, {"m.bin"}, [&] { parse(file.substr(0, size)); });
  }
}

// One F16 tensor "w" of a storage of six elements, given as a pickle.
std::string file_of(const std::string& tensor) {
  const std::string dict = pickled::entries("}", {{"w", tensor}});
  return zip_file(torch_parts(pickled::file(dict), {std::string(12, 'x')}));
}
std::string half_storage() { return pickled::storage("HalfStorage", "0", 6); }

void expect_malformed_file(std::vector<std::string> words, const std::string& file) {
  words.push_back("m.bin");
  expect_error(ErrorKind::malformed, words, [&] { parse(file); });
}

TEST(TorchFile, PlacesTensorsInTheirStorage) {
  const auto place = [](std::int64_t offset, const std::vector<std::int64_t>& size,
                        const std::vector<std::int64_t>& stride) {
    const std::string file = file_of(pickled::tensor(half_storage(), offset, size, stride));
    const TensorEntry entry = parse(file).at(0);
    const std::size_t storage = file.find(std::string(12, 'x'));
    return std::tuple(entry.begin - storage, entry.end - storage, entry.strides.empty());
  };
  EXPECT_EQ(place(0, {2, 3}, {3, 1}), std::tuple(0U, 12U, true));
  EXPECT_EQ(place(2, {4}, {1}), std::tuple(4U, 12U, true));
  EXPECT_EQ(place(5, {}, {}), std::tuple(10U, 12U, true));
  EXPECT_EQ(place(1, {1, 3}, {99, 1}), std::tuple(2U, 8U, true)) << "a stride that is never taken";
  EXPECT_EQ(place(6, {0, 7}, {7, 1}), std::tuple(12U, 12U, true));
  EXPECT_EQ(place(0, {0}, {INT64_MAX}), std::tuple(0U, 0U, true));
  EXPECT_EQ(place(1, {3}, {2}), std::tuple(2U, 12U, false));
  EXPECT_EQ(place(0, {4}, {0}), std::tuple(0U, 2U, false));
  EXPECT_EQ(place(0, {3, 2}, {1, 3}), std::tuple(0U, 12U, false));
}

TEST(TorchFile, RefusesTensorsThatLeadOutOfTheirStorage) {
  const auto expect_out = [](std::int64_t offset, const std::vector<std::int64_t>& size,
                             const std::vector<std::int64_t>& stride) {
    expect_malformed_file({"\"w\"", "lead out of its storage of 6"},
                          file_of(pickled::tensor(half_storage(), offset, size, stride)));
  };
  expect_out(0, {7}, {1});
  expect_out(1, {2, 3}, {3, 1});
  expect_out(7, {0}, {1});
  expect_out(INT64_MAX, {1}, {1});
  expect_out(0, {INT64_MAX}, {1});
  expect_out(0, {2}, {6});
  expect_out(0, {2}, {INT64_MAX});
  expect_out(0, {3, 3}, {INT64_MAX / 2, INT64_MAX / 2});
  expect_out(0, {INT64_MAX, INT64_MAX}, {0, 0});
  expect_out(0, {std::int64_t{1} << 62, 4, 0}, {0, 0, 0});
}

TEST(TorchFile, RefusesNegativeNumbers) {
  expect_malformed_file({"offset", "-1"}, file_of(pickled::tensor(half_storage(), -1, {1}, {1})));
  expect_malformed_file({"size", "-2"}, file_of(pickled::tensor(half_storage(), 0, {-2}, {1})));
  expect_malformed_file({"stride", "-3"}, file_of(pickled::tensor(half_storage(), 5, {2}, {-3})));
  expect_malformed_file(
      {"elements", "-6"},
      file_of(pickled::tensor(pickled::storage("HalfStorage", "0", -6), 0, {1}, {1})));
}

TEST(TorchFile, RefusesCallsOfAnotherForm) {
  const std::string rebuild = pickled::global("torch._utils", "_rebuild_tensor_v2");
  const std::string parameter = pickled::global("torch._utils", "_rebuild_parameter");
  const std::string tensor = pickled::tensor(half_storage(), 0, {6}, {1});
  expect_malformed_file({"\"w\"", "0 arguments"}, file_of(pickled::call(rebuild, ")")));
  expect_malformed_file({"\"w\"", "1 arguments"},
                        file_of(pickled::call(parameter, tensor + "\x85")));
  expect_malformed_file({"\"w\"", "differ in length"},
                        file_of(pickled::tensor(half_storage(), 0, {6}, {1, 1})));
  expect_malformed_file({"\"w\"", "at most 64"},
                        file_of(pickled::tensor(half_storage(), 0, std::vector<std::int64_t>(65, 1),
                                                std::vector<std::int64_t>(65, 1))));
  expect_malformed_file(
      {"\"w\"", "size must be a tuple", "None"},
      file_of(pickled::call(rebuild, test::join({"(", half_storage(), "K\x01NNNNt"}))));
  const auto expect_unsupported = [](std::vector<std::string> words, const std::string& value) {
    expect_error(ErrorKind::unsupported, words, [&] { parse(file_of(value)); });
  };
  expect_unsupported({"\"w\"", "entries or a state"}, tensor + "}b");
  expect_unsupported({"\"w\"", "entries or a state"}, tensor + "NNs");
  expect_unsupported({"\"w\"", "expected a tensor", "None"}, "N");
  expect_unsupported(
      {"\"w\"", "expected a tensor", "_rebuild_parameter"},
      pickled::call(parameter, pickled::call(parameter, tensor + "NN\x87") + "NN\x87"));
  expect_unsupported({"\"w\"", "a call of collections.OrderedDict"}, pickled::ordered_dict());
}

TEST(TorchFile, RefusesStoragesThatAreNotThere) {
  const auto expect_storage = [](std::vector<std::string> words, const std::string& storage) {
    words.push_back("\"w\"");
    expect_malformed_file(words, file_of(pickled::tensor(storage, 0, {1}, {1})));
  };
  expect_storage({"archive/data/1", "not in the file"}, pickled::storage("HalfStorage", "1", 6));
  expect_storage({"not in the file"}, pickled::storage("HalfStorage", "../version", 1));
  expect_storage({"should hold 5 elements of F16", "12 bytes"},
                 pickled::storage("HalfStorage", "0", 5));
  expect_storage({"should hold 6 elements of F32"}, pickled::storage("FloatStorage", "0", 6));
  expect_storage({"should hold"},
                 pickled::storage("DoubleStorage", "0", (std::int64_t{1} << 61) + 1));
  expect_storage({"expected a storage", "None"}, "N");
  expect_storage({"expected a storage", "a persistent id"}, "NQ");
  expect_storage(
      {"type of a storage", "None"},
      pickled::tuple({pickled::text("storage"), "N", pickled::text("0"), "N", pickled::number(6)}) +
          "Q");
}

TEST(TorchFile, RefusesTwoTensorsOfOneName) {
  const std::string tensor = pickled::tensor(half_storage(), 0, {6}, {1});
  const std::string dict = pickled::entries("}", {{"a", tensor}, {"b", tensor}, {"a", tensor}});
  expect_malformed_file({"two tensors", "\"a\""},
                        zip_file(torch_parts(pickled::file(dict), {std::string(12, 'x')})));
}

TEST(TorchFile, RefusesOtherArchives) {
  const std::string empty = pickled::file("}");
  expect_malformed_file({"FOLDER/data.pkl"}, zip_file({{"model.txt", "x"}}));
  expect_malformed_file({"FOLDER/data.pkl"}, zip_file({{"data.pkl", empty}, {"version", "3\n"}}));
  expect_malformed_file({"FOLDER/data.pkl"},
                        zip_file({{"a/b/data.pkl", empty}, {"a/b/version", "3"}}));
  expect_malformed_file({"two state dicts"},
                        zip_file({{"a/data.pkl", empty}, {"b/data.pkl", empty}}));
  expect_malformed_file({"a/version"}, zip_file({{"a/data.pkl", empty}}));
  const auto expect_unsupported = [](std::vector<std::string> words, const std::string& file) {
    words.push_back("m.bin");
    expect_error(ErrorKind::unsupported, words, [&] { parse(file); });
  };
  const auto file = [&](const std::string& version, const std::string& order) {
    return zip_file({{"a/data.pkl", empty}, {"a/version", version}, {"a/byteorder", order}});
  };
  EXPECT_TRUE(parse(file("3\n", "little")).empty());
  expect_unsupported({"format version", "11"}, file("11\n", "little"));
  expect_unsupported({"format version", "\"\""}, file("", "little"));
  expect_unsupported({"byte order", "\"big\""}, file("3\n", "big"));
  std::vector<ZipPart> compressed = torch_parts(empty, {"x"});
  compressed[2].method = 8;
  expect_unsupported({"archive/data/0", "compressed"}, zip_file(compressed));
}

}  // namespace
}  // namespace clusterfusion
