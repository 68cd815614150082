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
#include "model/families/family.hpp"
#include "model/layer_tensors.hpp"

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

std::string prefix_of(const TensorStore& store, const TensorNames& names) {
  const std::string prefix(names.prefix);
  const auto first = store.tensors().lower_bound(prefix);
  return first != store.tensors().end() && first->first.starts_with(prefix) ? prefix : "";
}

// The LM head by the one of its names that the checkpoint has, or else by the first.
std::string lm_head_name(const TensorStore& store, const TensorNames& names) {
  std::vector<std::string> found;
  for (const std::string_view module : names.lm_head) {
    std::string name = fmt::format("{}.weight", module);
    if (store.find(name) != nullptr) found.push_back(std::move(name));
  }
  if (found.empty()) return fmt::format("{}.weight", names.lm_head[0]);
  require(found.size() == 1, ErrorKind::malformed,
          "two LM heads: {} in {} and {} in {}; expected one of them", found[0],
          store.find(found[0])->file, found.back(), store.find(found.back())->file);
  return found[0];
}

std::vector<Slot> slots_of(const TensorStore& store, const ModelConfig& config,
                           const TensorNames& names, ModelWeights& weights) {
  const std::string prefix = prefix_of(store, names);
  const std::int64_t hidden = config.hidden_size;
  std::vector<Slot> slots;
  slots.push_back({fmt::format("{}{}.weight", prefix, names.embedding),
                   &weights.embedding,
                   {config.vocab_size, hidden}});
  weights.layers.resize(static_cast<std::size_t>(config.num_layers));
  const std::vector<LayerTensorShape> layer_list = layer_tensors(config);
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    for (const auto& [tensor, shape] : layer_list) {
      slots.push_back({fmt::format("{}{}.{}.{}", prefix, names.layers, i, names.name_of(tensor)),
                       &weights.layers[i][tensor], shape});
    }
  }
  const std::string final_norm = prefix + std::string(names.final_norm);
  slots.push_back({final_norm + ".weight", &weights.final_norm_weight, {hidden}});
  if (config.norm == NormKind::layer_norm) {
    slots.push_back({final_norm + ".bias", &weights.final_norm_bias, {hidden}});
  }
  const std::string lm_head = lm_head_name(store, names);
  if (!config.tied_embeddings || store.find(lm_head) != nullptr) {
    slots.push_back({lm_head, &weights.lm_head, {config.vocab_size, hidden}});
  }
  return slots;
}

bool is_ignored(std::string_view name, const TensorNames& names) {
  return std::ranges::any_of(names.ignored,
                             [&](std::string_view end) { return name.ends_with(end); });
}

// Tensors without a slot, but for those that the family ignores.
std::vector<std::string> unexpected_tensors(const TensorStore& store, const TensorNames& names,
                                            const std::vector<Slot>& slots) {
  std::vector<std::string_view> expected;
  for (const Slot& slot : slots) expected.push_back(slot.name);
  std::sort(expected.begin(), expected.end());
  std::vector<std::string> unexpected;
  for (const auto& [name, tensor] : store.tensors()) {
    const bool is_known = std::binary_search(expected.begin(), expected.end(), name);
    if (!is_known && !is_ignored(name, names)) unexpected.push_back(name);
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
void check_names(const TensorStore& store, const Family& family, const std::vector<Slot>& slots) {
  const std::string folder = store.folder().string();
  std::vector<std::string> missing;
  for (const Slot& slot : slots) {
    if (store.find(slot.name) == nullptr) missing.push_back(slot.name);
  }
  const std::vector<std::string> unexpected = unexpected_tensors(store, family.names, slots);
  if (missing.size() == 1 && unexpected.empty() &&
      missing[0] == lm_head_name(store, family.names)) {
    fail(ErrorKind::malformed,
         "{}: no LM head: tensor {} is missing and config.json does not tie the embeddings "
         "(\"tie_word_embeddings\" is not true): this is a base model, which gives no logits. "
         "Save it as {}",
         folder, quote(missing[0]), family.architectures[0]);
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

// As transformers does: a matrix of the LM head's own is used, whatever config.json says.
void tie_embeddings(const TensorStore& store, const TensorNames& names, ModelConfig& config,
                    BoundWeights& bound) {
  if (!config.tied_embeddings) return;
  ModelWeights& weights = bound.weights;
  const bool has_head = is_present(weights.lm_head);
  config.tied_embeddings =
      !has_head || (same_dtype(weights.lm_head.dtype, weights.embedding.dtype) &&
                    std::memcmp(weights.lm_head.data, weights.embedding.data,
                                static_cast<std::size_t>(num_bytes(weights.embedding))) == 0);
  if (config.tied_embeddings) {
    weights.lm_head = weights.embedding;
    return;
  }
  bound.warnings.push_back(
      fmt::format("{}: config.json ties the embeddings (tie_word_embeddings), but {} is there, and "
                  "differs from them: it is used, and they are not tied",
                  store.folder().string(), quote(lm_head_name(store, names))));
}

}  // namespace

BoundWeights bind_weights(const TensorStore& store, ModelConfig& config, ShapeStorage& shapes) {
  BoundWeights bound{};
  const Family& family = family_of(config);
  const std::vector<Slot> slots = slots_of(store, config, family.names, bound.weights);
  check_names(store, family, slots);
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
  const LayerWeights& first = bound.weights.layers.front();
  const bool is_separate = config.qkv_layout == QkvLayout::separate;
  config.dtype =
      *dtype_of(first[is_separate ? LayerTensor::query_weight : LayerTensor::qkv_weight]);
  warn_of_dtypes(store, slots, config.dtype, bound.warnings);
  tie_embeddings(store, family.names, config, bound);
  return bound;
}

}  // namespace clusterfusion
