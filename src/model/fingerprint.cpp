#include "model/fingerprint.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <span>
#include <vector>

#include "base/hash64.hpp"
#include "base/tensor_view.hpp"
#include "base/thread_pool.hpp"
#include "model/intact.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kPieceBytes = std::size_t{8} << 20;

std::string words_of(const RopeScaling& scaling) {
  return fmt::format("{} factor {} original {} frequencies {} {} turns {} {} {} attention {}",
                     static_cast<int>(scaling.kind), scaling.factor, scaling.original_positions,
                     scaling.low_freq_factor, scaling.high_freq_factor, scaling.beta_fast,
                     scaling.beta_slow, scaling.truncate, scaling.attention_factor);
}

std::string words_of(const ModelConfig& config) {
  return fmt::format(
      "{} vocab {} hidden {} layers {} heads {} kv heads {} head dim {} intermediate {} rotary {} "
      "theta {} {} norm {} eps {} activation {} parallel {} gated {} biases {} {} {} tied {} qkv "
      "{} {}",
      config.model_type, config.vocab_size, config.hidden_size, config.num_layers, config.num_heads,
      config.kv_heads(), config.head_dim, config.intermediate_size, config.rotary_dim,
      config.rope_theta, words_of(config.rope_scaling), static_cast<int>(config.norm),
      config.layer_norm_eps, static_cast<int>(config.activation), config.parallel_residual,
      config.gated_mlp, config.attention_bias, config.attention_out_bias, config.mlp_bias,
      config.tied_embeddings, static_cast<int>(config.qkv_layout), config.qk_norm);
}

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

}  // namespace

std::string fingerprint_of(const Model& model) {
  std::string words = words_of(model.config());
  std::vector<std::span<const std::byte>> pieces;
  const auto add = [&](const DLTensor& tensor) {
    words += is_present(tensor) ? fmt::format("; {} [{}]", name_of(*dtype_of(tensor)),
                                              fmt::join(std::span(tensor.shape, tensor.ndim), ", "))
                                : "; absent";
    if (!is_present(tensor)) return;
    std::span<const std::byte> bytes(data_of(tensor), static_cast<std::size_t>(num_bytes(tensor)));
    while (!bytes.empty()) {
      const std::size_t count = std::min(bytes.size(), kPieceBytes);
      pieces.push_back(bytes.first(count));
      bytes = bytes.subspan(count);
    }
  };
  const ModelWeights& weights = model.weights();
  add(weights.embedding);
  for (const LayerWeights& layer : weights.layers) std::ranges::for_each(layer.tensors, add);
  add(weights.final_norm_weight);
  add(weights.final_norm_bias);
  if (!model.config().tied_embeddings) add(weights.lm_head);

  std::vector<std::uint64_t> hashes(pieces.size() + 1);
  hashes.back() = hash64(bytes_of(words));
  ThreadPool threads(usable_cores());
  threads.run(std::ssize(pieces), [&](std::int64_t i, int) {
    const auto index = static_cast<std::size_t>(i);
    hashes[index] = hash64(pieces[index]);
  });
  require_intact(model);
  return fmt::format("{:016x}", hash64(std::as_bytes(std::span(hashes))));
}

}  // namespace clusterfusion
