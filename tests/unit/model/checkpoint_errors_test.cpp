// Checkpoint folders that cannot be opened, and what the user is told.
#include <functional>
#include <string>
#include <vector>

#include "clusterfusion/model.hpp"
#include "io/file_fixtures.hpp"
#include "io/torch_fixtures.hpp"
#include "model/checkpoint_builder.hpp"

namespace clusterfusion {
namespace {

using test::CheckpointBuilder;
using test::expect_error;
using test::safetensors_file;
using test::TemporaryFolder;
using test::torch_file;

// Opens a good checkpoint after `bend`.
void expect_refused(ErrorKind kind, const std::vector<std::string>& words,
                    const std::function<void(CheckpointBuilder&)>& bend) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  bend(builder);
  builder.write(folder);
  std::vector<std::string> all = words;
  all.push_back(folder.path().string());
  expect_error(kind, all, [&] { Model::open(folder.path()); });
}

TEST(CheckpointErrors, NamesWhatIsNoFolder) {
  const TemporaryFolder folder;
  const std::filesystem::path file = folder.write("model.safetensors", "abc");
  expect_error(ErrorKind::not_found, {"no such folder", "/absent"},
               [&] { Model::open(folder.path() / "absent"); });
  expect_error(ErrorKind::not_found, {file.string(), "is a file", "folder"},
               [&] { Model::open(file); });
  expect_error(ErrorKind::not_found, {"no config.json", folder.path().string()},
               [&] { Model::open(folder.path()); });
}

TEST(CheckpointErrors, NamesABrokenConfig) {
  const TemporaryFolder folder;
  CheckpointBuilder().write(folder);
  folder.write("config.json", "{");
  expect_error(ErrorKind::malformed, {(folder.path() / "config.json").string(), "line 1"},
               [&] { Model::open(folder.path()); });
}

TEST(CheckpointErrors, NamesABrokenGenerationConfig) {
  const TemporaryFolder folder;
  CheckpointBuilder().write(folder);
  folder.write("generation_config.json", R"({"eos_token_id": "end"})");
  expect_error(ErrorKind::malformed,
               {(folder.path() / "generation_config.json").string(), "eos_token_id", "\"end\""},
               [&] { Model::open(folder.path()); });
}

TEST(CheckpointErrors, NamesMissingTensorsAndThoseThatMayBeMeant) {
  expect_refused(ErrorKind::malformed,
                 {"1 of the 28 tensors", "missing", "\"gpt_neox.layers.1.mlp.dense_h_to_4h.bias\"",
                  "no place for: none"},
                 [](auto& c) { c.remove("gpt_neox.layers.1.mlp.dense_h_to_4h.bias"); });
  expect_refused(
      ErrorKind::malformed,
      {"missing: \"gpt_neox.embed_in.weight\"", "no place for: \"gpt_neox.embedin.weight\""},
      [](auto& c) { c.at("gpt_neox.embed_in.weight").name = "gpt_neox.embedin.weight"; });
  expect_refused(ErrorKind::malformed,
                 {"12 of the 40 tensors", "\"gpt_neox.layers.2.input_layernorm.weight\"", "..."},
                 [](auto& c) { c.config["num_hidden_layers"] = 3; });
}

TEST(CheckpointErrors, NamesUnexpectedTensors) {
  expect_refused(ErrorKind::malformed,
                 {"1 tensors", "no place for", "\"gpt_neox.adapter.weight\"", "model.safetensors"},
                 [](auto& c) {
                   c.add("gpt_neox.adapter.weight", {2, 2});
                 });
  expect_refused(ErrorKind::malformed, {"12 tensors", "\"gpt_neox.layers.1.attention.dense.bias\""},
                 [](auto& c) { c.config["num_hidden_layers"] = 1; });
  expect_refused(ErrorKind::malformed, {"4 tensors", "query_key_value.bias", "config.json"},
                 [](auto& c) { c.config["attention_bias"] = false; });
}

TEST(CheckpointErrors, ExplainsAMissingLmHead) {
  expect_refused(ErrorKind::malformed,
                 {"no LM head", "embed_out.weight", "tie_word_embeddings", "GPTNeoXForCausalLM"},
                 [](auto& c) { c.remove("embed_out.weight"); });
  expect_refused(ErrorKind::malformed, {"two LM heads", "embed_out.weight", "lm_head.weight"},
                 [](auto& c) {
                   c.add("lm_head.weight", {16, 8});
                 });
}

TEST(CheckpointErrors, NamesAWrongShape) {
  expect_refused(ErrorKind::malformed,
                 {"model.safetensors", "\"gpt_neox.layers.0.attention.dense.weight\"", "[8, 6]",
                  "expected [8, 8]"},
                 [](auto& c) {
                   c.replace("gpt_neox.layers.0.attention.dense.weight", {8, 6});
                 });
  expect_refused(ErrorKind::malformed, {"\"gpt_neox.final_layer_norm.bias\"", "[1, 8]", "[8]"},
                 [](auto& c) {
                   c.replace("gpt_neox.final_layer_norm.bias", {1, 8});
                 });
  expect_refused(ErrorKind::malformed,
                 {"\"gpt_neox.embed_in.weight\"", "[16, 8]", "expected [17, 8]"},
                 [](auto& c) { c.config["vocab_size"] = 17; });
  expect_refused(ErrorKind::malformed, {"\"embed_out.weight\"", "[15, 8]", "expected [16, 8]"},
                 [](auto& c) {
                   c.replace("embed_out.weight", {15, 8});
                 });
}

TEST(CheckpointErrors, NamesAWrongDtype) {
  expect_refused(ErrorKind::unsupported,
                 {"model.safetensors", "\"gpt_neox.final_layer_norm.weight\"", "F64",
                  "expected F16", "BF16", "F32"},
                 [](auto& c) { c.replace("gpt_neox.final_layer_norm.weight", {8}, "F64", 8); });
  expect_refused(ErrorKind::unsupported, {"\"embed_out.weight\"", "I8"}, [](auto& c) {
    c.replace("embed_out.weight", {16, 8}, "I8", 1);
  });
}

TEST(CheckpointErrors, NamesATensorThatIsNotContiguous) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.add("gpt_neox.layers.0.attention.bias", {1, 1, 4, 4}, "BOOL", 1);
  builder.write_config(folder);
  // A buffer may lie as it likes: nobody reads it.
  folder.write(
      "pytorch_model.bin",
      torch_file(builder.tensors, {}, {{"gpt_neox.layers.0.attention.bias", {0, 0, 1, 4}}}));
  EXPECT_EQ(Model::open(folder.path())->config().num_layers, 2);
  folder.write("pytorch_model.bin",
               torch_file(builder.tensors, {}, {{"gpt_neox.embed_in.weight", {1, 16}}}));
  expect_error(ErrorKind::unsupported,
               {"pytorch_model.bin", "\"gpt_neox.embed_in.weight\"", "not contiguous", "[16, 8]",
                "strides [1, 16]", "v.contiguous()"},
               [&] { Model::open(folder.path()); });
}

TEST(CheckpointErrors, NamesATruncatedFile) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.write(folder);
  const std::string whole = safetensors_file(builder.tensors);
  for (const std::size_t size : {std::size_t{0}, std::size_t{5}, std::size_t{8}, std::size_t{100},
                                 whole.size() / 2, whole.size() - 1}) {
    folder.write("model.safetensors", whole.substr(0, size));
    expect_error(ErrorKind::malformed, {(folder.path() / "model.safetensors").string()},
                 [&] { Model::open(folder.path()); });
  }
}

}  // namespace
}  // namespace clusterfusion
