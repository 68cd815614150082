// Checkpoints with random weights, written to disk: of the test-only family, and of Qwen2.
#pragma once

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "base/tensor_view.hpp"
#include "io/file_fixtures.hpp"
#include "model/config_reader.hpp"
#include "support/grouped_family.hpp"
#include "support/random_model.hpp"

namespace clusterfusion::test {

// The tensors of `model` under the names of its family.
inline std::string safetensors_of(const Model& model) {
  const TensorNames& names = family_of(model.config()).names;
  std::vector<test::RawTensor> tensors;
  const auto add = [&](const std::string& name, const DLTensor& tensor) {
    if (!is_present(tensor)) return;
    static const std::map<DType, std::string> kDTypes = {
        {DType::float16, "F16"}, {DType::bfloat16, "BF16"}, {DType::float32, "F32"}};
    tensors.push_back({name,
                       kDTypes.at(*dtype_of(tensor)),
                       {tensor.shape, tensor.shape + tensor.ndim},
                       {reinterpret_cast<const char*>(data_of(tensor)),
                        static_cast<std::size_t>(num_bytes(tensor))}});
  };
  const std::string prefix(names.prefix);
  const ModelWeights& weights = model.weights();
  add(prefix + std::string(names.embedding) + ".weight", weights.embedding);
  for (std::size_t layer = 0; layer < weights.layers.size(); ++layer) {
    for (std::size_t i = 0; i < kNumLayerTensors; ++i) {
      add(prefix + std::string(names.layers) + "." + std::to_string(layer) + "." +
              names.name_of(static_cast<LayerTensor>(i)),
          weights.layers[layer].tensors[i]);
    }
  }
  add(prefix + std::string(names.final_norm) + ".weight", weights.final_norm_weight);
  add(prefix + std::string(names.final_norm) + ".bias", weights.final_norm_bias);
  if (!model.config().tied_embeddings) {
    add(std::string(names.lm_head[0]) + ".weight", weights.lm_head);
  }
  return test::safetensors_file(tensors);
}

// Eight query heads of 16 share two heads of keys and values.
inline nlohmann::json grouped_config() {
  return {{"architectures", {"GroupedForCausalLM"}},
          {"model_type", "grouped"},
          {"vocab_size", 301},
          {"hidden_size", 128},
          {"num_hidden_layers", 3},
          {"num_attention_heads", 8},
          {"num_key_value_heads", 2},
          {"intermediate_size", 320},
          {"max_position_embeddings", 2048},
          {"rope_theta", 5000.0}};
}

// Opened from a folder that is gone again: what is mapped stays.
inline std::shared_ptr<const Model> open_random_model(const nlohmann::json& json, DType dtype) {
  ModelConfig config = parse_config(json.dump(), "config.json");
  config.dtype = dtype;
  const test::TemporaryFolder folder;
  folder.write("config.json", json.dump());
  folder.write("model.safetensors", safetensors_of(*make_random_model(config)));
  return Model::open(folder.path());
}

inline std::shared_ptr<const Model> open_grouped_model(const nlohmann::json& json,
                                                       DType dtype = DType::float16) {
  grouped_family();
  return open_random_model(json, dtype);
}

// Separate matrices of queries, keys and values, with biases.
inline std::shared_ptr<const Model> open_qwen2_model() {
  return open_random_model({{"architectures", {"Qwen2ForCausalLM"}},
                            {"model_type", "qwen2"},
                            {"vocab_size", 301},
                            {"hidden_size", 96},
                            {"num_hidden_layers", 3},
                            {"num_attention_heads", 6},
                            {"num_key_value_heads", 2},
                            {"intermediate_size", 320},
                            {"tie_word_embeddings", true}},
                           DType::bfloat16);
}

}  // namespace clusterfusion::test
