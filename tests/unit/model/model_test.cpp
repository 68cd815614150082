#include "clusterfusion/model.hpp"

#include <unistd.h>

#include <fstream>
#include <iomanip>
#include <map>
#include <sstream>
#include <string>

#include "base/tensor_view.hpp"
#include "io/file_fixtures.hpp"
#include "io/torch_fixtures.hpp"
#include "model/checkpoint_builder.hpp"

namespace clusterfusion {
namespace {

using test::CheckpointBuilder;
using test::TemporaryFolder;

std::string bytes_of(const DLTensor& tensor) {
  return {reinterpret_cast<const char*>(data_of(tensor)),
          static_cast<std::size_t>(num_bytes(tensor))};
}

std::vector<std::int64_t> shape_of(const DLTensor& tensor) {
  return {tensor.shape, tensor.shape + tensor.ndim};
}

// All views, under the names that transformers gives them in memory.
std::map<std::string, DLTensor> named_views(const Model& model) {
  const ModelWeights& weights = model.weights();
  std::map<std::string, DLTensor> views = {
      {"gpt_neox.embed_in.weight", weights.embedding},
      {"gpt_neox.final_layer_norm.weight", weights.final_norm_weight},
      {"gpt_neox.final_layer_norm.bias", weights.final_norm_bias},
      {"lm_head.weight", weights.lm_head}};
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    const LayerWeights& layer = weights.layers[i];
    const std::string start = "gpt_neox.layers." + std::to_string(i) + ".";
    views[start + "input_layernorm.weight"] = layer[LayerTensor::input_norm_weight];
    views[start + "input_layernorm.bias"] = layer[LayerTensor::input_norm_bias];
    views[start + "attention.query_key_value.weight"] = layer[LayerTensor::qkv_weight];
    views[start + "attention.query_key_value.bias"] = layer[LayerTensor::qkv_bias];
    views[start + "attention.dense.weight"] = layer[LayerTensor::attention_out_weight];
    views[start + "attention.dense.bias"] = layer[LayerTensor::attention_out_bias];
    views[start + "post_attention_layernorm.weight"] = layer[LayerTensor::post_norm_weight];
    views[start + "post_attention_layernorm.bias"] = layer[LayerTensor::post_norm_bias];
    views[start + "mlp.dense_h_to_4h.weight"] = layer[LayerTensor::mlp_up_weight];
    views[start + "mlp.dense_h_to_4h.bias"] = layer[LayerTensor::mlp_up_bias];
    views[start + "mlp.dense_4h_to_h.weight"] = layer[LayerTensor::mlp_down_weight];
    views[start + "mlp.dense_4h_to_h.bias"] = layer[LayerTensor::mlp_down_bias];
  }
  std::erase_if(views, [](const auto& view) { return !is_present(view.second); });
  return views;
}

std::string fnv1a(const std::string& bytes) {
  std::uint64_t value = 0xCBF29CE484222325;
  for (const char byte : bytes) {
    value = (value ^ static_cast<unsigned char>(byte)) * 0x100000001B3;
  }
  std::ostringstream text;
  text << std::hex << std::setw(16) << std::setfill('0') << value;
  return text.str();
}

TEST(Model, ReadsTheSameAfterRelease) {
  const auto model = Model::open(CF_SOURCE_DIR "/models/demo");
  const DLTensor& embedding = model->weights().embedding;
  const std::string before = bytes_of(embedding);
  const auto size = static_cast<std::size_t>(num_bytes(embedding));
  model->release({data_of(embedding), size});
  EXPECT_EQ(bytes_of(embedding), before);
}

class SavedByTransformers : public ::testing::TestWithParam<const char*> {};

TEST_P(SavedByTransformers, HasTheTensorsThatWereSaved) {
  const std::filesystem::path folder =
      std::filesystem::path(CF_SOURCE_DIR "/tests/unit/model/data/checkpoints") / GetParam();
  std::ifstream recording(folder / "expected.json");
  const nlohmann::json expected = nlohmann::json::parse(recording);
  const std::shared_ptr<const Model> model = Model::open(folder);
  EXPECT_EQ(model->folder(), folder);
  EXPECT_EQ(name_of(model->config().dtype), expected["dtype"].get<std::string>());
  EXPECT_EQ(model->num_parameters(), expected["num_parameters"].get<std::int64_t>());
  EXPECT_EQ(model->total_bytes(), model->num_parameters() * size_of(model->config().dtype));
  EXPECT_EQ(model->find_non_finite(), std::nullopt);

  const std::map<std::string, DLTensor> views = named_views(*model);
  EXPECT_EQ(views.size(), expected["tensors"].size());
  for (const auto& [name, view] : views) {
    SCOPED_TRACE(name);
    ASSERT_TRUE(expected["tensors"].contains(name));
    EXPECT_EQ(shape_of(view), expected["tensors"][name]["shape"].get<std::vector<std::int64_t>>());
    EXPECT_EQ(fnv1a(bytes_of(view)), expected["tensors"][name]["fnv1a"].get<std::string>());
    EXPECT_EQ(dtype_of(view), model->config().dtype);
    EXPECT_EQ(view.device.device_type, kDLCPU);
  }
}

INSTANTIATE_TEST_SUITE_P(Model, SavedByTransformers,
                         ::testing::Values("untied_float32", "tied_float16", "sharded_bfloat16",
                                           "no_attention_bias_float16", "torch_file_float16",
                                           "torch_shards_bfloat16"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Model, OpensWithAndWithoutPrefix) {
  for (const char* prefix : {"gpt_neox.", ""}) {
    const TemporaryFolder folder;
    CheckpointBuilder builder(prefix);
    builder.write(folder);
    const auto model = Model::open(folder.path());
    const std::string name = std::string(prefix) + "layers.1.mlp.dense_4h_to_h.weight";
    EXPECT_EQ(bytes_of(model->weights().layers[1][LayerTensor::mlp_down_weight]),
              builder.at(name).data);
  }
}

TEST(Model, KnowsBothNamesOfTheLmHead) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.at("embed_out.weight").name = "lm_head.weight";
  builder.write(folder);
  EXPECT_EQ(bytes_of(Model::open(folder.path())->weights().lm_head),
            builder.at("lm_head.weight").data);
}

TEST(Model, PassesOverOldBuffers) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  for (const std::string layer : {"gpt_neox.layers.0.", "gpt_neox.layers.1."}) {
    builder.add(layer + "attention.bias", {1, 1, 4, 4}, "BOOL", 1);
    builder.add(layer + "attention.masked_bias", {}, "F16");
    builder.add(layer + "attention.rotary_emb.inv_freq", {1}, "F32", 4);
  }
  builder.add("gpt_neox.rotary_emb.inv_freq", {1}, "F32", 4);
  builder.at("gpt_neox.layers.0.attention.masked_bias").data = std::string("\x00\xfc", 2);
  builder.write(folder);
  const auto model = Model::open(folder.path());
  EXPECT_EQ(named_views(*model).size(), 28U);
  EXPECT_EQ(model->find_non_finite(), std::nullopt) << "minus infinity in a buffer does not count";
}

TEST(Model, AllowsVectorsOfAnotherDtype) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.replace("gpt_neox.final_layer_norm.weight", {8}, "F32", 4);
  builder.replace("gpt_neox.layers.0.mlp.dense_h_to_4h.bias", {12}, "BF16");
  builder.write(folder);
  const auto model = Model::open(folder.path());
  EXPECT_EQ(model->config().dtype, DType::float16);
  EXPECT_EQ(dtype_of(model->weights().final_norm_weight), DType::float32);
  EXPECT_EQ(dtype_of(model->weights().layers[0][LayerTensor::mlp_up_bias]), DType::bfloat16);
}

// Parameters of the builder's model: 16 x 8 of the embedding and of the LM head; a layer has four
// norm vectors of 8, matrices 24 x 8, 8 x 8, 12 x 8, 8 x 12 and biases 24, 8, 12, 8; two norms
// of 8.
constexpr std::int64_t kEmbedding = 16 * 8;
constexpr std::int64_t kLayers = 2 * (32 + 192 + 64 + 96 + 96 + 52);
constexpr std::int64_t kFinalNorm = 16;

// As transformers, which casts them; here each is used as it is.
TEST(Model, AllowsMatricesOfSeveralDtypes) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.replace("gpt_neox.embed_in.weight", {16, 8}, "F32", 4);
  builder.replace("embed_out.weight", {16, 8}, "BF16");
  builder.config["tie_word_embeddings"] = true;
  builder.write(folder);
  const auto model = Model::open(folder.path());
  EXPECT_EQ(model->config().dtype, DType::float16);
  EXPECT_EQ(dtype_of(model->weights().embedding), DType::float32);
  EXPECT_EQ(dtype_of(model->weights().lm_head), DType::bfloat16);
  EXPECT_FALSE(model->config().tied_embeddings) << "they are not the same bytes";
  EXPECT_EQ(model->bytes_per_token(), 2 * (kEmbedding + kLayers + kFinalNorm) + 4 * 8);
  ASSERT_EQ(model->warnings().size(), 2U);
  EXPECT_THAT(model->warnings()[0],
              ::testing::AllOf(::testing::HasSubstr("\"gpt_neox.embed_in.weight\" is float32"),
                               ::testing::HasSubstr("those of the layers float16")));
  EXPECT_THAT(model->warnings()[1], ::testing::HasSubstr("tie_word_embeddings"));
}

TEST(Model, WarnsOfAnLmHeadThatIsToBeTiedAndDiffers) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.config["tie_word_embeddings"] = true;
  builder.write(folder);
  const auto model = Model::open(folder.path());
  EXPECT_FALSE(model->config().tied_embeddings);
  EXPECT_NE(model->weights().lm_head.data, model->weights().embedding.data);
  ASSERT_EQ(model->warnings().size(), 1U);
  EXPECT_THAT(model->warnings()[0],
              ::testing::AllOf(::testing::HasSubstr("tie_word_embeddings"),
                               ::testing::HasSubstr("\"embed_out.weight\" is there, and differs")));
}

// As files of safetensors before 0.3.1 and of other writers begin at any byte.
TEST(Model, CopiesWhatIsMisaligned) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.write(folder);
  const auto aligned = Model::open(folder.path());
  EXPECT_THAT(aligned->warnings(), ::testing::IsEmpty());
  const auto expected = named_views(*aligned);
  builder.tensors.insert(builder.tensors.begin(),
                         {"gpt_neox.layers.0.attention.bias", "BOOL", {1}, std::string(1, '\1')});
  const TemporaryFolder other;
  builder.write(other);
  const auto model = Model::open(other.path());
  const auto views = named_views(*model);
  ASSERT_EQ(views.size(), expected.size());
  for (const auto& [name, view] : views) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view.data) % 2, 0U) << name;
    EXPECT_EQ(bytes_of(view), bytes_of(expected.at(name))) << name;
  }
  ASSERT_EQ(model->warnings().size(), 1U);
  EXPECT_THAT(model->warnings()[0], ::testing::AllOf(::testing::HasSubstr(other.path().string()),
                                                     ::testing::HasSubstr("28 of 28 tensors"),
                                                     ::testing::HasSubstr("save_file")));
}

// As torch aligns to 64 bytes, this takes another writer.
TEST(Model, CopiesWhatIsMisalignedInATorchFile) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.write(folder);
  const auto aligned = Model::open(folder.path());
  const auto expected = named_views(*aligned);
  const TemporaryFolder other;
  builder.write_config(other);
  const std::string file = test::torch_file(builder.tensors, {.alignment = 1});
  ASSERT_EQ(file.find(builder.at("gpt_neox.embed_in.weight").data) % 2, 1U);
  other.write("pytorch_model.bin", file);
  const auto model = Model::open(other.path());
  for (const auto& [name, view] : named_views(*model)) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(view.data) % 2, 0U) << name;
    EXPECT_EQ(bytes_of(view), bytes_of(expected.at(name))) << name;
  }
  ASSERT_EQ(model->warnings().size(), 1U);
  EXPECT_THAT(model->warnings()[0], ::testing::AllOf(::testing::HasSubstr("copied into memory"),
                                                     ::testing::HasSubstr("pytorch_model.bin'"),
                                                     ::testing::HasSubstr("torch.save")));
}

TEST(Model, CountsParametersAndBytes) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.write(folder);
  const auto untied = Model::open(folder.path());
  EXPECT_EQ(untied->num_parameters(), 2 * kEmbedding + kLayers + kFinalNorm);
  EXPECT_EQ(untied->total_bytes(), 2 * untied->num_parameters());
  EXPECT_EQ(untied->bytes_per_token(), 2 * (kEmbedding + kLayers + kFinalNorm + 8));

  builder.remove("embed_out.weight");
  builder.config["tie_word_embeddings"] = true;
  builder.write(folder);
  const auto tied = Model::open(folder.path());
  EXPECT_EQ(tied->num_parameters(), kEmbedding + kLayers + kFinalNorm);
  EXPECT_EQ(tied->total_bytes(), 2 * tied->num_parameters());
  EXPECT_EQ(tied->bytes_per_token(), untied->bytes_per_token());
}

// transformers (PreTrainedModel.tie_weights) ties two tensors only if they are equal.
TEST(Model, KeepsALmHeadThatDiffersFromTheEmbedding) {
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.config["tie_word_embeddings"] = true;
  builder.write(folder);
  const auto differing = Model::open(folder.path());
  EXPECT_FALSE(differing->config().tied_embeddings);
  EXPECT_EQ(bytes_of(differing->weights().lm_head), builder.at("embed_out.weight").data);

  builder.at("embed_out.weight").data = builder.at("gpt_neox.embed_in.weight").data;
  builder.write(folder);
  const auto equal = Model::open(folder.path());
  EXPECT_TRUE(equal->config().tied_embeddings);
  EXPECT_EQ(equal->weights().lm_head.data, equal->weights().embedding.data);
}

TEST(Model, TakesEndOfTextTokensFromTheGenerationConfig) {
  const TemporaryFolder folder;
  CheckpointBuilder().write(folder);
  folder.write("generation_config.json", R"({"eos_token_id": [3, 5]})");
  EXPECT_EQ(Model::open(folder.path())->config().eos_tokens, (std::vector<TokenId>{3, 5}));
}

std::size_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::size_t total_pages = 0;
  std::size_t resident_pages = 0;
  statm >> total_pages >> resident_pages;
  return resident_pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

// Four gigabytes of embeddings in a sparse file, opened without reading them.
TEST(Model, OpensALargeCheckpointWithoutReadingIt) {
  constexpr std::int64_t kVocab = std::int64_t{1} << 27;
  const TemporaryFolder folder;
  CheckpointBuilder builder;
  builder.config["vocab_size"] = kVocab;
  builder.remove("gpt_neox.embed_in.weight");
  builder.remove("embed_out.weight");
  nlohmann::ordered_json header;
  std::int64_t end = 0;
  const auto place = [&](const std::string& name, const std::vector<std::int64_t>& shape,
                         std::int64_t bytes) {
    header[name] = {{"dtype", "F16"}, {"shape", shape}, {"data_offsets", {end, end + bytes}}};
    end += bytes;
  };
  for (const test::RawTensor& tensor : builder.tensors) {
    place(tensor.name, tensor.shape, static_cast<std::int64_t>(tensor.data.size()));
  }
  place("gpt_neox.embed_in.weight", {kVocab, 8}, kVocab * 16);
  place("embed_out.weight", {kVocab, 8}, kVocab * 16);
  std::string text = header.dump();
  text.append(8 - text.size() % 8, ' ');
  const std::string head = test::safetensors_head(text);
  folder.write("config.json", builder.config.dump());
  const std::filesystem::path path = folder.write("model.safetensors", head);
  std::filesystem::resize_file(path, head.size() + static_cast<std::size_t>(end));

  const std::size_t before = resident_bytes();
  const auto model = Model::open(folder.path());
  EXPECT_GT(model->total_bytes(), std::int64_t{4} << 30);
  EXPECT_LT(resident_bytes(), before + (16U << 20));
}

}  // namespace
}  // namespace clusterfusion
