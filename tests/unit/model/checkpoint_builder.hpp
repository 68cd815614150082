// Small GPT-NeoX checkpoint folders that a test can bend in every way before it writes them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "io/file_fixtures.hpp"

namespace clusterfusion::test {

// Two layers, hidden 8, two heads, intermediate 12, vocabulary 16; all tensors F16, each with bytes
// of its own.
struct CheckpointBuilder {
  nlohmann::json config = {{"architectures", {"GPTNeoXForCausalLM"}},
                           {"model_type", "gpt_neox"},
                           {"vocab_size", 16},
                           {"hidden_size", 8},
                           {"num_hidden_layers", 2},
                           {"num_attention_heads", 2},
                           {"intermediate_size", 12},
                           {"rotary_pct", 0.5}};
  std::vector<RawTensor> tensors;

  explicit CheckpointBuilder(const std::string& prefix = "gpt_neox.") {
    add(prefix + "embed_in.weight", {16, 8});
    for (const char* layer : {"layers.0.", "layers.1."}) {
      const std::string start = prefix + layer;
      for (const char* norm : {"input_layernorm", "post_attention_layernorm"})
        add_norm(start + norm);
      add_linear(start + "attention.query_key_value", 24, 8);
      add_linear(start + "attention.dense", 8, 8);
      add_linear(start + "mlp.dense_h_to_4h", 12, 8);
      add_linear(start + "mlp.dense_4h_to_h", 8, 12);
    }
    add_norm(prefix + "final_layer_norm");
    add("embed_out.weight", {16, 8});
  }

  RawTensor& add(const std::string& name, const std::vector<std::int64_t>& shape,
                 const std::string& dtype = "F16", std::size_t element_bytes = 2) {
    std::size_t bytes = element_bytes;
    for (const std::int64_t extent : shape) bytes *= static_cast<std::size_t>(extent);
    std::string data(bytes, '\0');
    // Bytes up to 0x3F: finite in every dtype.
    for (std::size_t i = 0; i < bytes; ++i) {
      data[i] = static_cast<char>((i * 5 + 7 * tensors.size()) % 64);
    }
    return tensors.emplace_back(RawTensor{name, dtype, shape, data});
  }
  // The same tensor in another shape or dtype.
  void replace(const std::string& name, const std::vector<std::int64_t>& shape,
               const std::string& dtype = "F16", std::size_t element_bytes = 2) {
    add(name, shape, dtype, element_bytes);
    at(name) = tensors.back();
    tensors.pop_back();
  }
  void remove(const std::string& name) {
    std::erase_if(tensors, [&](const RawTensor& tensor) { return tensor.name == name; });
  }
  RawTensor& at(const std::string& name) {
    return *std::find_if(tensors.begin(), tensors.end(),
                         [&](const RawTensor& tensor) { return tensor.name == name; });
  }
  void write_config(const TemporaryFolder& folder) const {
    folder.write("config.json", config.dump());
  }
  void write(const TemporaryFolder& folder) const {
    write_config(folder);
    folder.write("model.safetensors", safetensors_file(tensors));
  }

 private:
  void add_norm(const std::string& name) {
    add(name + ".weight", {8});
    add(name + ".bias", {8});
  }
  void add_linear(const std::string& name, std::int64_t out, std::int64_t in) {
    add(name + ".weight", {out, in});
    add(name + ".bias", {out});
  }
};

}  // namespace clusterfusion::test
