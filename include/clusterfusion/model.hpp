// A checkpoint as it lies on disk: configuration and memory-mapped weights.
#pragma once

#include <dlpack/dlpack.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "clusterfusion/layer_spec.hpp"

namespace clusterfusion {

using TokenId = std::int32_t;

enum class DType { float16, bfloat16, float32 };

// Element size in bytes.
int size_of(DType dtype) noexcept;
// "float16", "bfloat16", "float32".
const char* name_of(DType dtype) noexcept;

// Hyper-parameters of a model, read from config.json: those of its layers, which are all alike, and
// of what is around them.
struct ModelConfig : LayerSpec {
  std::string model_type = "gpt_neox";  // the family, as config.json names it
  std::int64_t vocab_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t max_positions = 0;  // the longest context: max_position_embeddings, but no more
                                   // than sliding_window, and what YaRN extends it to
  // Positions that a token attends to, itself included, in some layers or all; 0: all before it.
  // Contexts end there: beyond, the library would compute something else than the model.
  std::int64_t sliding_window = 0;
  bool tied_embeddings = false;  // the LM head is the input embedding
  DType dtype = DType::float32;  // of the layers' matrices (read from the first layer's); the
                                 // embeddings may have another
  std::optional<TokenId> bos_token;
  std::vector<TokenId> eos_tokens;  // any of these ends a text
  std::string hidden_act;           // as spelled in config.json
};

// What a checkpoint's generation_config.json says of sampling and lengths; nothing where it is
// silent.
struct GenerationConfig {
  bool do_sample = false;
  std::optional<float> temperature;
  std::optional<std::int32_t> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<std::int64_t> max_new_tokens;
};

// Views of one layer's tensors. Matrices are row-major [out, in], as torch.nn.Linear stores them;
// rows of the QKV matrix are those of LayerSpec::qkv_size(): without grouped heads q, k, v of head
// 0, then of head 1, ... Biases and norm parameters may have another dtype than the matrices.
// A view whose `data` is null is absent.
struct LayerWeights {
  std::array<DLTensor, kNumLayerTensors> tensors{};

  DLTensor& operator[](LayerTensor tensor) noexcept { return tensors[index_of(tensor)]; }
  const DLTensor& operator[](LayerTensor tensor) const noexcept {
    return tensors[index_of(tensor)];
  }
};

struct ModelWeights {
  DLTensor embedding{};  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  DLTensor final_norm_weight{}, final_norm_bias{};  // [hidden]; RMSNorm has no bias
  DLTensor lm_head{};                               // [vocab, hidden]; the embedding if tied
};

// A model whose tensors somebody else has in memory, such as a framework of Python's.
struct ModelInMemory {
  struct Tensor {
    std::string name;  // as the model's class in transformers names it
    DLTensor view;     // on the CPU, row-major without gaps
  };
  std::string name;               // stands for a folder in messages
  std::string config;             // the text of a config.json
  std::string generation_config;  // the text of a generation_config.json; empty if there is none
  std::vector<Tensor> tensors;
  std::shared_ptr<const void> owner;  // of the tensors' memory; kept as long as the model
};

// A checkpoint folder, opened. The weights are memory-mapped read-only and used in place: pages
// come in as they are touched. Only tensors that begin at no multiple of their element's size are
// copied, and warnings() tells. Immutable; may be shared between threads.
class Model {
 public:
  // Opens `folder`: config.json with the first that is there of model.safetensors,
  // model.safetensors.index.json and its shards, pytorch_model.bin (of PyTorch 1.6 or newer), and
  // pytorch_model.bin.index.json and its shards. Checks every tensor's presence, dtype and shape
  // against the configuration. `folder` may be a name on the hub, then with a `revision`:
  // find_checkpoint() in hub.hpp.
  // Errors: not_found, permission_denied, io, malformed, unsupported; those of find_checkpoint().
  static std::shared_ptr<const Model> open(const std::filesystem::path& folder,
                                           const std::string& revision = "");

  // The same of tensors in memory, which are used in place: who changes them changes the model, of
  // which an engine may hold parts in another form. Errors: malformed, unsupported.
  static std::shared_ptr<const Model> from_memory(ModelInMemory given);

  virtual ~Model() = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelConfig& config() const noexcept { return config_; }
  const ModelWeights& weights() const noexcept { return weights_; }
  const std::filesystem::path& folder() const noexcept { return folder_; }

  // Number of parameters (a tied LM head counts once).
  std::int64_t num_parameters() const noexcept;
  // Bytes of weights that one decode step reads: all matrices and vectors of the layers, the final
  // norm and the LM head once, and one row of the embedding.
  std::int64_t bytes_per_token() const noexcept;
  // Bytes of all weights as stored.
  std::int64_t total_bytes() const noexcept;
  // Looks for NaN and infinity in every weight (reads the whole checkpoint) and returns the first
  // finding as "tensor NAME [index] = VALUE in FILE", or nothing.
  virtual std::optional<std::string> find_non_finite() const = 0;
  // Read from generation_config.json each time; all is absent where the folder has none.
  // Errors: permission_denied, io, malformed.
  virtual GenerationConfig generation_config() const { return {}; }
  // What a user should know of this checkpoint though it runs: copies, matrices of several dtypes.
  const std::vector<std::string>& warnings() const noexcept { return warnings_; }
  // A file of which parts could not be read any more since it was opened (it became shorter, or the
  // disk failed), or nothing. Zeros stand for them: results since are worth nothing.
  virtual std::optional<std::string> find_lost_file() const { return std::nullopt; }
  // Says that these bytes of the weights will not be read again soon. Mapped ones leave resident
  // memory until they are touched; they may be read at any time as before.
  virtual void release(std::span<const std::byte> /*bytes*/) const noexcept {}

 protected:
  Model() = default;
  ModelConfig config_;
  ModelWeights weights_;
  std::filesystem::path folder_;
  std::vector<std::string> warnings_;
};

}  // namespace clusterfusion
