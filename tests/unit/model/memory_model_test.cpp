// Models whose tensors somebody else has in memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "base/tensor_view.hpp"
#include "clusterfusion/error.hpp"
#include "clusterfusion/model.hpp"
#include "model/checkpoint_builder.hpp"

namespace clusterfusion {
namespace {

using test::CheckpointBuilder;
using test::RawTensor;

DLDataType type_of(const std::string& dtype) {
  if (dtype == "BF16") return {kDLBfloat, 16, 1};
  if (dtype == "I8") return {kDLInt, 8, 1};
  return {kDLFloat, static_cast<std::uint8_t>(dtype == "F32" ? 32 : 16), 1};
}

// The builder's tensors as a framework would hold them.
ModelInMemory given_by(CheckpointBuilder& builder) {
  ModelInMemory given;
  given.name = "a model";
  given.config = builder.config.dump();
  for (RawTensor& tensor : builder.tensors) {
    DLTensor view{};
    view.data = tensor.data.data();
    view.device = {kDLCPU, 0};
    view.ndim = static_cast<int>(tensor.shape.size());
    view.dtype = type_of(tensor.dtype);
    view.shape = tensor.shape.data();
    given.tensors.push_back({tensor.name, view});
  }
  return given;
}

void expect_error(ModelInMemory given, ErrorKind kind, const std::string& message) {
  try {
    Model::from_memory(std::move(given));
    FAIL() << "no error; expected one with: " << message;
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    EXPECT_THAT(error.what(), ::testing::HasSubstr(message));
  }
}

TEST(MemoryModel, UsesTheTensorsInPlaceAndKeepsTheirOwner) {
  CheckpointBuilder builder;
  ModelInMemory given = given_by(builder);
  const auto owner = std::make_shared<int>(1);
  given.owner = owner;
  std::shared_ptr<const Model> model = Model::from_memory(std::move(given));
  EXPECT_EQ(owner.use_count(), 2);
  EXPECT_EQ(model->folder(), "a model");
  EXPECT_EQ(model->config().dtype, DType::float16);
  const auto expect_at = [&](const DLTensor& view, const char* name) {
    EXPECT_EQ(static_cast<const void*>(data_of(view)), builder.at(name).data.data()) << name;
  };
  expect_at(model->weights().embedding, "gpt_neox.embed_in.weight");
  expect_at(model->weights().lm_head, "embed_out.weight");
  expect_at(model->weights().layers[1][LayerTensor::mlp_down_bias],
            "gpt_neox.layers.1.mlp.dense_4h_to_h.bias");
  model.reset();
  EXPECT_EQ(owner.use_count(), 1);
}

TEST(MemoryModel, ReadsWhatGenerationConfigSays) {
  CheckpointBuilder builder;
  EXPECT_FALSE(Model::from_memory(given_by(builder))->generation_config().max_new_tokens);
  ModelInMemory given = given_by(builder);
  given.generation_config = R"({"eos_token_id": [3, 4], "max_new_tokens": 7})";
  const auto model = Model::from_memory(std::move(given));
  EXPECT_EQ(model->generation_config().max_new_tokens, 7);
  EXPECT_THAT(model->config().eos_tokens, ::testing::ElementsAre(3, 4));
}

TEST(MemoryModel, SaysWhatDoesNotFit) {
  CheckpointBuilder builder;
  ModelInMemory given = given_by(builder);
  given.config = "{";
  expect_error(given, ErrorKind::malformed, "config.json of a model");

  given = given_by(builder);
  given.tensors.pop_back();
  expect_error(given, ErrorKind::malformed, "a model: no LM head");

  given = given_by(builder);
  given.tensors.push_back(given.tensors[0]);
  expect_error(given, ErrorKind::malformed, "two tensors are named \"gpt_neox.embed_in.weight\"");

  given = given_by(builder);
  given.tensors[0].view.device = {kDLCUDA, 0};
  expect_error(given, ErrorKind::unsupported, "is not in the memory of the CPU");

  given = given_by(builder);
  std::int64_t strides[] = {1, 16};
  given.tensors[0].view.strides = strides;
  expect_error(given, ErrorKind::unsupported, "\"gpt_neox.embed_in.weight\" is not contiguous");

  builder.replace("gpt_neox.embed_in.weight", {16, 8}, "I8", 1);
  expect_error(given_by(builder), ErrorKind::unsupported,
               "has dtype integer of 8 bits; expected F16, BF16 or F32");
}

}  // namespace
}  // namespace clusterfusion
