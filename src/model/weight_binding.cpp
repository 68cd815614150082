#include "model/weight_binding.hpp"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/fail.hpp"
#include "base/tensor_view.hpp"
#include "io/json.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kMaxNamesInMessage = 5;

// A place in ModelWeights and what must go there.
struct Slot {
  std::string name;
  DLTensor* view;
  std::vector<std::int64_t> shape;
};

std::optional<DType> parse_dtype(std::string_view dtype) {
  if (dtype == "F16") return DType::float16;
  if (dtype == "BF16") return DType::bfloat16;
  if (dtype == "F32") return DType::float32;
  return std::nullopt;
}

std::string prefix_of(const TensorStore& store) {
  const std::string prefix = "gpt_neox.";
  const auto first = store.tensors().lower_bound(prefix);
  return first != store.tensors().end() && first->first.starts_with(prefix) ? prefix : "";
}

// transformers saves it as embed_out; version 5 calls it lm_head in memory and loads either name.
const char* lm_head_name(const TensorStore& store) {
  const bool has_old = store.find("embed_out.weight") != nullptr;
  const bool has_new = store.find("lm_head.weight") != nullptr;
  require(!(has_old && has_new), ErrorKind::malformed,
          "two LM heads: embed_out.weight in {} and lm_head.weight in {}; expected one of them",
          has_old ? store.find("embed_out.weight")->file : "",
          has_new ? store.find("lm_head.weight")->file : "");
  return has_new ? "lm_head.weight" : "embed_out.weight";
}

void add_layer_slots(const ModelConfig& config, const std::string& prefix, LayerWeights& layer,
                     std::vector<Slot>& slots) {
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t intermediate = config.intermediate_size;
  const auto add = [&](const char* name, DLTensor& view, std::vector<std::int64_t> shape) {
    slots.push_back({prefix + name, &view, std::move(shape)});
  };
  add("input_layernorm.weight", layer.input_norm_weight, {hidden});
  add("input_layernorm.bias", layer.input_norm_bias, {hidden});
  add("attention.query_key_value.weight", layer.qkv_weight, {3 * hidden, hidden});
  add("attention.dense.weight", layer.attention_out_weight, {hidden, hidden});
  if (config.attention_bias) {
    add("attention.query_key_value.bias", layer.qkv_bias, {3 * hidden});
    add("attention.dense.bias", layer.attention_out_bias, {hidden});
  }
  add("post_attention_layernorm.weight", layer.post_norm_weight, {hidden});
  add("post_attention_layernorm.bias", layer.post_norm_bias, {hidden});
  add("mlp.dense_h_to_4h.weight", layer.mlp_up_weight, {intermediate, hidden});
  add("mlp.dense_h_to_4h.bias", layer.mlp_up_bias, {intermediate});
  add("mlp.dense_4h_to_h.weight", layer.mlp_down_weight, {hidden, intermediate});
  add("mlp.dense_4h_to_h.bias", layer.mlp_down_bias, {hidden});
}

std::vector<Slot> slots_of(const TensorStore& store, const ModelConfig& config,
                           ModelWeights& weights) {
  const std::string prefix = prefix_of(store);
  const std::int64_t hidden = config.hidden_size;
  std::vector<Slot> slots;
  slots.push_back({prefix + "embed_in.weight", &weights.embedding, {config.vocab_size, hidden}});
  weights.layers.resize(static_cast<std::size_t>(config.num_layers));
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    add_layer_slots(config, fmt::format("{}layers.{}.", prefix, i), weights.layers[i], slots);
  }
  slots.push_back({prefix + "final_layer_norm.weight", &weights.final_norm_weight, {hidden}});
  slots.push_back({prefix + "final_layer_norm.bias", &weights.final_norm_bias, {hidden}});
  const char* lm_head = lm_head_name(store);
  if (!config.tied_embeddings || store.find(lm_head) != nullptr) {
    slots.push_back({lm_head, &weights.lm_head, {config.vocab_size, hidden}});
  }
  return slots;
}

bool is_old_buffer(std::string_view name) {
  for (const char* suffix : {".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq"}) {
    if (name.ends_with(suffix)) return true;
  }
  return false;
}

// Tensors without a slot, old buffers left out.
std::vector<std::string> unexpected_tensors(const TensorStore& store,
                                            const std::vector<Slot>& slots) {
  std::vector<std::string_view> expected;
  for (const Slot& slot : slots) expected.push_back(slot.name);
  std::sort(expected.begin(), expected.end());
  std::vector<std::string> unexpected;
  for (const auto& [name, tensor] : store.tensors()) {
    const bool is_known = std::binary_search(expected.begin(), expected.end(), name);
    if (!is_known && !is_old_buffer(name)) unexpected.push_back(name);
  }
  return unexpected;
}

std::string first_names(const std::vector<std::string>& names) {
  std::vector<std::string> shown;
  for (const std::string& name : names) {
    if (shown.size() == kMaxNamesInMessage) break;
    shown.push_back(quote(name));
  }
  return fmt::format("{}{}", fmt::join(shown, ", "), shown.size() < names.size() ? ", ..." : "");
}

// The tensors are those that the configuration asks for, no more and no fewer.
void check_names(const TensorStore& store, const std::vector<Slot>& slots) {
  const std::string folder = store.folder().string();
  std::vector<std::string> missing;
  for (const Slot& slot : slots) {
    if (store.find(slot.name) == nullptr) missing.push_back(slot.name);
  }
  const std::vector<std::string> unexpected = unexpected_tensors(store, slots);
  if (missing.size() == 1 && unexpected.empty() && missing[0] == lm_head_name(store)) {
    fail(ErrorKind::malformed,
         "{}: no LM head: tensor \"embed_out.weight\" is missing and config.json does not tie the "
         "embeddings (\"tie_word_embeddings\" is not true): this is a base model, which gives no "
         "logits. Save it as GPTNeoXForCausalLM",
         folder);
  }
  if (!missing.empty()) {
    fail(ErrorKind::malformed,
         "{}: {} of the {} tensors that config.json asks for are missing: {}; tensors that it has "
         "no place for: {}",
         folder, missing.size(), slots.size(), first_names(missing),
         unexpected.empty() ? "none" : first_names(unexpected));
  }
  if (!unexpected.empty()) {
    fail(ErrorKind::malformed,
         "{}: {} tensors that the model of config.json has no place for: {} (in {}). Leaving them "
         "out would give another model's results; remove them, or correct config.json",
         folder, unexpected.size(), first_names(unexpected), store.find(unexpected[0])->file);
  }
}

DType checked_dtype(const StoredTensor& stored, const Slot& slot) {
  const std::string where = fmt::format("{}: tensor {}", stored.file, quote(slot.name));
  const std::optional<DType> dtype = parse_dtype(stored.dtype);
  require(dtype.has_value(), ErrorKind::unsupported, "{} has dtype {}; expected F16, BF16 or F32",
          where, stored.dtype);
  require(stored.shape == slot.shape, ErrorKind::malformed,
          "{} has shape [{}]; expected [{}], by config.json", where, fmt::join(stored.shape, ", "),
          fmt::join(slot.shape, ", "));
  require(stored.strides.empty(), ErrorKind::unsupported,
          "{} is not contiguous: shape [{}] with strides [{}] cannot be used in place. Rewrite the "
          "file: {}",
          where, fmt::join(stored.shape, ", "), fmt::join(stored.strides, ", "),
          rewrite_command(stored));
  return *dtype;
}

bool is_aligned(const StoredTensor& stored, DType dtype) {
  const auto address = reinterpret_cast<std::uintptr_t>(stored.data.data());
  return address % static_cast<std::uintptr_t>(size_of(dtype)) == 0;
}

DLTensor view_of(const std::byte* data, DType dtype, const Slot& slot, ShapeStorage& shapes) {
  std::array<std::int64_t, 2>& shape = shapes.emplace_back();
  std::copy(slot.shape.begin(), slot.shape.end(), shape.begin());
  DLTensor view{};
  // DLPack has no view of constant data; nobody may write through this one (the pages are mapped
  // read-only).
  view.data = const_cast<std::byte*>(data);
  view.device = {kDLCPU, 0};
  view.ndim = static_cast<int>(slot.shape.size());
  view.dtype = to_dl(dtype);
  view.shape = shape.data();
  return view;
}

// `first` is the first tensor that was copied.
void warn_of_copies(const TensorStore& store, const StoredTensor* first, BoundWeights& bound) {
  if (first == nullptr) return;
  std::size_t bytes = 0;
  for (const std::vector<std::byte>& copy : bound.copies) bytes += copy.size();
  bound.warnings.push_back(fmt::format(
      "{}: {} of {} tensors begin at no multiple of their element's size, so that they were copied "
      "into memory ({} MB) instead of being used in place. Rewriting the files avoids that: {}",
      store.folder().string(), bound.copies.size(), bound.tensors.size(), bytes / 1'000'000,
      rewrite_command(*first)));
}

void warn_of_dtypes(const TensorStore& store, const std::vector<Slot>& slots, DType dtype,
                    std::vector<std::string>& warnings) {
  for (const Slot& slot : slots) {
    if (slot.view->ndim != 2 || *dtype_of(*slot.view) == dtype) continue;
    warnings.push_back(
        fmt::format("{}: matrices have more than one dtype: {} is {}, those of the layers {}. The "
                    "CPU uses each as it is; a GPU gets all in {}",
                    store.folder().string(), quote(slot.name), name_of(*dtype_of(*slot.view)),
                    name_of(dtype), name_of(dtype)));
    return;
  }
}

void tie_embeddings(ModelWeights& weights, ModelConfig& config) {
  if (!config.tied_embeddings) return;
  const bool has_head = is_present(weights.lm_head);
  config.tied_embeddings =
      !has_head || (same_dtype(weights.lm_head.dtype, weights.embedding.dtype) &&
                    std::memcmp(weights.lm_head.data, weights.embedding.data,
                                static_cast<std::size_t>(num_bytes(weights.embedding))) == 0);
  if (config.tied_embeddings) weights.lm_head = weights.embedding;
}

}  // namespace

BoundWeights bind_weights(const TensorStore& store, ModelConfig& config, ShapeStorage& shapes) {
  BoundWeights bound{};
  const std::vector<Slot> slots = slots_of(store, config, bound.weights);
  check_names(store, slots);
  const StoredTensor* first_copied = nullptr;
  for (const Slot& slot : slots) {
    const StoredTensor& stored = *store.find(slot.name);
    const DType dtype = checked_dtype(stored, slot);
    const std::byte* data = stored.data.data();
    if (!is_aligned(stored, dtype)) {
      data = bound.copies.emplace_back(stored.data.begin(), stored.data.end()).data();
      store.release(stored.data);
      if (first_copied == nullptr) first_copied = &stored;
    }
    *slot.view = view_of(data, dtype, slot, shapes);
    bound.tensors.push_back({slot.name, stored.file, *slot.view});
  }
  warn_of_copies(store, first_copied, bound);
  config.dtype = *dtype_of(bound.weights.layers.front().qkv_weight);
  warn_of_dtypes(store, slots, config.dtype, bound.warnings);
  tie_embeddings(bound.weights, config);
  return bound;
}

}  // namespace clusterfusion
