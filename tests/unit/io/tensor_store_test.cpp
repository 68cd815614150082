#include "io/tensor_store.hpp"

#include <string>

#include "io/torch_fixtures.hpp"

namespace clusterfusion {
namespace {

using test::expect_error;
using test::safetensors_file;
using test::TemporaryFolder;
using test::torch_file;

constexpr const char* kIndex = "model.safetensors.index.json";

std::string text_of(const StoredTensor* tensor) {
  return {reinterpret_cast<const char*>(tensor->data.data()), tensor->data.size()};
}

void write_index(const TemporaryFolder& folder, const nlohmann::json& weight_map) {
  folder.write(
      kIndex, nlohmann::json{{"metadata", {{"total_size", 8}}}, {"weight_map", weight_map}}.dump());
}

// Two shards: a and b in the first, c in the second.
void write_shards(const TemporaryFolder& folder) {
  folder.write("1.safetensors",
               safetensors_file({{"a", "F16", {2}, "aaaa"}, {"b", "U8", {1, 2}, "bb"}}));
  folder.write("2.safetensors", safetensors_file({{"c", "U8", {3}, "ccc"}}));
  write_index(folder, {{"a", "1.safetensors"}, {"b", "1.safetensors"}, {"c", "2.safetensors"}});
}

TEST(TensorStore, OpensOneFile) {
  const TemporaryFolder folder;
  folder.write("model.safetensors", safetensors_file({{"a", "F16", {2}, "abcd"}}));
  const TensorStore store(folder.path());
  ASSERT_NE(store.find("a"), nullptr);
  EXPECT_EQ(text_of(store.find("a")), "abcd");
  EXPECT_EQ(store.find("a")->dtype, "F16");
  EXPECT_EQ(store.find("a")->shape, std::vector<std::int64_t>{2});
  EXPECT_EQ(store.find("b"), nullptr);
}

TEST(TensorStore, OpensShards) {
  const TemporaryFolder folder;
  write_shards(folder);
  const TensorStore store(folder.path());
  EXPECT_EQ(store.tensors().size(), 3U);
  EXPECT_EQ(text_of(store.find("b")), "bb");
  EXPECT_EQ(text_of(store.find("c")), "ccc");
  EXPECT_EQ(store.find("c")->file, (folder.path() / "2.safetensors").string());
}

// As transformers does.
TEST(TensorStore, PrefersOneFileToShards) {
  const TemporaryFolder folder;
  write_shards(folder);
  folder.write("model.safetensors", safetensors_file({{"d", "U8", {1}, "d"}}));
  EXPECT_EQ(TensorStore(folder.path()).tensors().size(), 1U);
}

// Hugging Face's cache: snapshots/REVISION/FILE -> ../../blobs/HASH.
TEST(TensorStore, FollowsLinkedShards) {
  const TemporaryFolder blobs;
  write_shards(blobs);
  const TemporaryFolder snapshot;
  for (const char* name : {"1.safetensors", "2.safetensors", kIndex}) {
    std::filesystem::create_symlink(blobs.path() / name, snapshot.path() / name);
  }
  EXPECT_EQ(text_of(TensorStore(snapshot.path()).find("c")), "ccc");
}

TEST(TensorStore, RefusesAnIndexThatLeadsOutOfTheFolder) {
  const TemporaryFolder outside;
  const std::string other = outside.write("1.safetensors", safetensors_file({})).string();
  for (const std::string& shard :
       {other, std::string("../x/1.safetensors"), std::string(".."), std::string("."),
        std::string(""), std::string("a/b"), std::string("a\\b"), std::string("a\0b", 3)}) {
    const TemporaryFolder folder;
    write_index(folder, {{"a", shard}});
    expect_error(ErrorKind::malformed,
                 {(folder.path() / kIndex).string(), "\"a\"", "plain name", "same folder",
                  nlohmann::json(shard).dump()},
                 [&] { TensorStore{folder.path()}; });
  }
}

TEST(TensorStore, RefusesAnIndexThatLies) {
  const TemporaryFolder folder;
  const std::string index = (folder.path() / kIndex).string();
  const auto expect_malformed = [&](std::vector<std::string> words) {
    expect_error(ErrorKind::malformed, words, [&] { TensorStore{folder.path()}; });
  };
  write_shards(folder);
  write_index(folder, {{"a", "1.safetensors"}, {"b", "2.safetensors"}, {"c", "2.safetensors"}});
  expect_malformed({index, "\"b\"", "2.safetensors", "but it is in", "1.safetensors"});
  write_index(folder, {{"a", "1.safetensors"}, {"x", "1.safetensors"}, {"c", "2.safetensors"}});
  expect_malformed({index, "\"x\"", "1.safetensors", "none of the shards"});
  write_index(folder, {{"a", "1.safetensors"}, {"c", "2.safetensors"}});
  expect_malformed({index, "\"b\"", "1.safetensors", "not in the weight_map"});
  write_index(folder, nlohmann::json::object());
  expect_malformed({index, "weight_map", "empty"});
  write_index(folder, {{"a", 7}});
  expect_malformed({index, "\"a\"", "a string", "found 7"});
  folder.write(kIndex, "{}");
  expect_malformed({index, "no key \"weight_map\""});
  folder.write(kIndex, "{\"weight_map\":\n{\"a\" 1}}");
  expect_malformed({index, "line 2"});
}

TEST(TensorStore, RefusesATensorInTwoShards) {
  const TemporaryFolder folder;
  write_shards(folder);
  folder.write("2.safetensors",
               safetensors_file({{"c", "U8", {3}, "ccc"}, {"a", "F16", {2}, "aaaa"}}));
  expect_error(ErrorKind::malformed, {"\"a\"", "two shards", "1.safetensors", "2.safetensors"},
               [&] { TensorStore{folder.path()}; });
}

TEST(TensorStore, NamesAMissingShard) {
  const TemporaryFolder folder;
  write_shards(folder);
  std::filesystem::remove(folder.path() / "2.safetensors");
  expect_error(ErrorKind::not_found, {kIndex, (folder.path() / "2.safetensors").string()},
               [&] { TensorStore{folder.path()}; });
}

TEST(TensorStore, NamesABrokenShard) {
  const TemporaryFolder folder;
  write_shards(folder);
  folder.write("2.safetensors", "broken");
  expect_error(ErrorKind::malformed, {(folder.path() / "2.safetensors").string(), "6 bytes"},
               [&] { TensorStore{folder.path()}; });
}

TEST(TensorStore, SaysWhatIsMissing) {
  const TemporaryFolder folder;
  expect_error(ErrorKind::not_found,
               {folder.path().string(), "model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json"},
               [&] { TensorStore{folder.path()}; });
}

TEST(TensorStore, OpensTorchFiles) {
  const TemporaryFolder folder;
  const std::filesystem::path file =
      folder.write("pytorch_model.bin", torch_file({{"a", "F16", {2}, "abcd"}}));
  const TensorStore store(folder.path());
  ASSERT_NE(store.find("a"), nullptr);
  EXPECT_EQ(text_of(store.find("a")), "abcd");
  EXPECT_EQ(store.find("a")->dtype, "F16");
  EXPECT_EQ(store.find("a")->file, file.string());
}

TEST(TensorStore, OpensShardsOfTorchFiles) {
  const TemporaryFolder folder;
  folder.write("1.bin", torch_file({{"a", "F16", {2}, "aaaa"}, {"b", "U8", {1, 2}, "bb"}}));
  folder.write("2.bin", torch_file({{"c", "U8", {3}, "ccc"}}));
  folder.write("pytorch_model.bin.index.json",
               R"({"weight_map": {"a": "1.bin", "b": "1.bin", "c": "2.bin"}})");
  const TensorStore store(folder.path());
  EXPECT_EQ(store.tensors().size(), 3U);
  EXPECT_EQ(text_of(store.find("b")), "bb");
  EXPECT_EQ(text_of(store.find("c")), "ccc");
  folder.write("2.bin", torch_file({{"a", "U8", {3}, "ccc"}}));
  expect_error(ErrorKind::malformed, {"\"a\"", "two shards", "1.bin", "2.bin"},
               [&] { TensorStore{folder.path()}; });
}

// As transformers does: safetensors before torch's files, whether whole or in shards.
TEST(TensorStore, PrefersSafetensors) {
  const TemporaryFolder folder;
  const auto first_tensor = [&] { return TensorStore(folder.path()).tensors().begin()->first; };
  folder.write("shard.bin", torch_file({{"torch_shard", "U8", {1}, "d"}}));
  folder.write("pytorch_model.bin.index.json", R"({"weight_map": {"torch_shard": "shard.bin"}})");
  EXPECT_EQ(first_tensor(), "torch_shard");
  folder.write("pytorch_model.bin", torch_file({{"torch", "U8", {1}, "d"}}));
  EXPECT_EQ(first_tensor(), "torch");
  write_shards(folder);
  EXPECT_EQ(first_tensor(), "a");
  folder.write("model.safetensors", safetensors_file({{"whole", "U8", {1}, "d"}}));
  EXPECT_EQ(first_tensor(), "whole");
}

}  // namespace
}  // namespace clusterfusion
