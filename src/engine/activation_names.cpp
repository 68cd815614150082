#include "engine/activation_names.hpp"

#include <charconv>
#include <optional>
#include <string_view>

#include "base/fail.hpp"
#include "model/families/family.hpp"

namespace clusterfusion {
namespace {

struct NamePattern {
  std::string name;  // "*" stands for a layer
  ActivationKind kind;
  // Of transformers' tuple: an entry more than there are layers, and the last one is what the final
  // norm gives.
  bool has_final_entry = false;

  bool has_layer() const noexcept { return name.find('*') != std::string::npos; }
  std::int64_t entries(std::int64_t num_layers) const noexcept {
    return has_final_entry ? num_layers + 1 : num_layers;
  }
};

// "self_attn" of "self_attn.o_proj".
std::string parent_of(std::string_view module) {
  return std::string(module.substr(0, module.rfind('.')));
}

// TransformerLens' hooks (HookedTransformer.hook_dict); transformers' tuple of hidden states; the
// modules of the model's class in transformers, of which the output is meant.
std::vector<NamePattern> patterns_of(const ModelConfig& config) {
  const TensorNames& names = family_of(config).names;
  const auto module_of = [&](LayerTensor weight) { return names.layer[index_of(weight) / 2]; };
  const std::string_view attention_out = module_of(LayerTensor::attention_out_weight);
  const std::string_view mlp_out = module_of(LayerTensor::mlp_down_weight);
  const std::string layer = fmt::format("{}{}.*", names.prefix, names.layers);
  return {
      {"blocks.*.hook_resid_pre", ActivationKind::residual_before},
      {"blocks.*.hook_attn_out", ActivationKind::attention_out},
      {"blocks.*.hook_mlp_out", ActivationKind::mlp_out},
      {"blocks.*.hook_resid_post", ActivationKind::residual_after},
      {"ln_final.hook_normalized", ActivationKind::final_norm},
      {"hidden_states[*]", ActivationKind::residual_before, true},
      {layer, ActivationKind::residual_after},
      {fmt::format("{}.{}", layer, parent_of(attention_out)), ActivationKind::attention_out},
      {fmt::format("{}.{}", layer, attention_out), ActivationKind::attention_out},
      {fmt::format("{}.{}", layer, parent_of(mlp_out)), ActivationKind::mlp_out},
      {fmt::format("{}.{}", layer, mlp_out), ActivationKind::mlp_out},
      {fmt::format("{}{}", names.prefix, names.final_norm), ActivationKind::final_norm},
  };
}
constexpr std::string_view kAnyBlock = "blocks.*.";

std::string known_names(const std::vector<NamePattern>& patterns) {
  std::string list;
  for (const NamePattern& pattern : patterns) {
    if (!list.empty()) list += ", ";
    list += pattern.name;
  }
  return list;
}

// What stands in `name` for the "*" of `pattern`: itself, or a number; nothing if it does not fit.
std::optional<std::string_view> match(const NamePattern& pattern, std::string_view name) {
  const std::size_t star = pattern.name.find('*');
  if (star == std::string::npos) {
    if (name != pattern.name) return std::nullopt;
    return std::string_view{};
  }
  const std::string_view before = std::string_view(pattern.name).substr(0, star);
  const std::string_view behind = std::string_view(pattern.name).substr(star + 1);
  if (name.size() <= before.size() + behind.size() || !name.starts_with(before) ||
      !name.ends_with(behind))
    return std::nullopt;
  const std::string_view middle =
      name.substr(before.size(), name.size() - before.size() - behind.size());
  if (middle == "*") return middle;
  const std::string_view digits = middle.starts_with('-') ? middle.substr(1) : middle;
  const bool is_number =
      !digits.empty() && digits.find_first_not_of("0123456789") == std::string_view::npos;
  if (!is_number) return std::nullopt;
  return middle;
}

ActivationSite site_of(const NamePattern& pattern, std::int64_t layer, std::int64_t num_layers) {
  if (!pattern.has_layer() || layer == num_layers) return {ActivationKind::final_norm, 0};
  return {pattern.kind, layer};
}

// A number as it stands in a name. Python's way of counting from the end is known for the tuple.
std::int64_t layer_of(const NamePattern& pattern, std::string_view number, std::string_view name,
                      std::int64_t num_layers) {
  const std::int64_t entries = pattern.entries(num_layers);
  std::int64_t layer = 0;
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), layer);
  const std::int64_t least = pattern.has_final_entry ? -entries : 0;
  require(error == std::errc() && layer >= least && layer < entries, ErrorKind::out_of_range,
          "at: '{}' names layer {}, expected one in [{}, {}]", name, number, least, entries - 1);
  return layer < 0 ? layer + entries : layer;
}

std::string with_number(std::string_view name, std::int64_t layer) {
  std::string result(name);
  return result.replace(result.find('*'), 1, std::to_string(layer));
}

struct Matched {
  const NamePattern* pattern;
  std::string name;
  std::string_view layer;  // in `name` of the caller: "*", a number, or nothing
};

Matched find_pattern(const std::vector<NamePattern>& patterns, const std::string& name) {
  for (const NamePattern& pattern : patterns) {
    if (const auto layer = match(pattern, name)) return {&pattern, name, *layer};
    if (pattern.name.starts_with(kAnyBlock) && pattern.name.substr(kAnyBlock.size()) == name)
      return {&pattern, pattern.name, "*"};
  }
  fail(ErrorKind::invalid_argument,
       "at: no activation is called '{}'; expected one of {} (a layer's number, or * for each of "
       "the layers)",
       name, known_names(patterns));
}

void append_layers(const Matched& found, const HiddenStatesOptions& options,
                   std::int64_t num_layers, std::vector<NamedSite>& sites) {
  const std::int64_t entries = found.pattern->entries(num_layers);
  const auto append = [&](std::int64_t layer) {
    require(layer >= 0 && layer < entries, ErrorKind::out_of_range,
            "layers: {} is none of '{}', expected one in [0, {}]", layer, found.name, entries - 1);
    sites.push_back({with_number(found.name, layer), site_of(*found.pattern, layer, num_layers)});
  };
  if (options.layers) {
    for (const std::int64_t layer : *options.layers) append(layer);
  } else {
    for (std::int64_t layer = 0; layer < entries; ++layer) append(layer);
  }
}

}  // namespace

std::vector<NamedSite> sites_of(const HiddenStatesOptions& options, const ModelConfig& config) {
  const std::vector<NamePattern> patterns = patterns_of(config);
  const std::int64_t num_layers = config.num_layers;
  require(!options.at.empty(), ErrorKind::invalid_argument,
          "at: expected at least one name of {}, found none", known_names(patterns));
  std::vector<NamedSite> sites;
  bool used_layers = false;
  for (const std::string& name : options.at) {
    const Matched found = find_pattern(patterns, name);
    if (found.layer == "*") {
      used_layers = true;
      append_layers(found, options, num_layers, sites);
      continue;
    }
    const std::int64_t layer =
        found.layer.empty() ? 0 : layer_of(*found.pattern, found.layer, name, num_layers);
    sites.push_back({name, site_of(*found.pattern, layer, num_layers)});
  }
  require(used_layers || !options.layers, ErrorKind::invalid_argument,
          "layers: no name has a * that they could stand for, found '{}'; leave layers out, or "
          "write * in place of a number",
          options.at.front());
  require(!sites.empty(), ErrorKind::invalid_argument, "layers: expected at least one, found none");
  return sites;
}

}  // namespace clusterfusion
