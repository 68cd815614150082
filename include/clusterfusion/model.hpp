// A GPT-NeoX checkpoint as it lies on disk: configuration and memory-mapped weights.
#pragma once

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace clusterfusion {

using TokenId = std::int32_t;

enum class DType { float16, bfloat16, float32 };

// Element size in bytes.
int size_of(DType dtype) noexcept;
// "float16", "bfloat16", "float32".
const char* name_of(DType dtype) noexcept;

// The element-wise function between the two matrices of the MLP, as `hidden_act` of config.json
// names it. Formulas: transformers/activations.py (ACT2FN).
enum class Activation {
  gelu_erf,      // 0.5 x (1 + erf(x / sqrt 2)):        "gelu", "gelu_python"
  gelu_tanh,     // 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))): "gelu_new", "gelu_fast",
                 // "gelu_pytorch_tanh", "gelu_accurate"
  gelu_quick,    // x sigmoid(1.702 x):                 "quick_gelu"
  relu,          // max(x, 0):                          "relu"
  relu_squared,  // max(x, 0)^2:                        "relu2"
  silu,          // x sigmoid(x):                       "silu", "swish"
  mish,          // x tanh(softplus(x)):                "mish"
  tanh,          //                                     "tanh"
  sigmoid,       //                                     "sigmoid"
  identity,      //                                     "linear"
};

// Hyper-parameters of a GPT-NeoX model, read from config.json.
struct ModelConfig {
  std::int64_t vocab_size = 0;
  std::int64_t hidden_size = 0;
  std::int64_t num_layers = 0;
  std::int64_t num_heads = 0;
  std::int64_t head_dim = 0;           // hidden_size / num_heads
  std::int64_t intermediate_size = 0;  // rows of the MLP's first matrix
  std::int64_t max_positions = 0;      // max_position_embeddings: the longest context
  std::int64_t rotary_dim = 0;         // the first rotary_dim of head_dim values are rotated; even
  double rope_theta = 10000.0;         // base of the rotary frequencies
  double layer_norm_eps = 1e-5;
  Activation activation = Activation::gelu_erf;
  bool parallel_residual = true;  // x + attention(ln1 x) + mlp(ln2 x), else one after the other
  bool attention_bias = true;     // QKV and output projection have biases
  bool tied_embeddings = false;   // the LM head is the input embedding
  DType dtype = DType::float32;   // of the layers' matrices (read from the first layer's); the
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

// Views of one layer's tensors. Matrices are row-major [out, in], as torch.nn.Linear stores them.
// Biases and LayerNorm parameters may have another dtype than the matrices.
// A view whose `data` is null is absent (only the two attention biases may be).
struct LayerWeights {
  DLTensor input_norm_weight, input_norm_bias;        // [hidden]
  DLTensor qkv_weight, qkv_bias;                      // [3 hidden, hidden], [3 hidden]: rows are
                                                      // q, k, v of head 0, then of head 1, ...
  DLTensor attention_out_weight, attention_out_bias;  // [hidden, hidden], [hidden]
  DLTensor post_norm_weight, post_norm_bias;          // [hidden]
  DLTensor mlp_up_weight, mlp_up_bias;                // [intermediate, hidden], [intermediate]
  DLTensor mlp_down_weight, mlp_down_bias;            // [hidden, intermediate], [hidden]
};

struct ModelWeights {
  DLTensor embedding;  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  DLTensor final_norm_weight, final_norm_bias;  // [hidden]
  DLTensor lm_head;                             // [vocab, hidden]; the embedding if tied
};

// A model whose tensors somebody else has in memory, such as a framework of Python's.
struct ModelInMemory {
  struct Tensor {
    std::string name;  // as transformers' GPTNeoXForCausalLM names it
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
