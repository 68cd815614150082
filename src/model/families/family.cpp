#include "model/families/family.hpp"

#include <fmt/ranges.h>

#include <algorithm>
#include <optional>

#include "base/fail.hpp"

namespace clusterfusion {
namespace {

std::vector<const Family*>& families() {
  static std::vector<const Family*> all{&gpt_neox_family(), &llama_family(), &mistral_family(),
                                        &qwen2_family(), &qwen3_family()};
  return all;
}

const Family* find_type(std::string_view model_type) {
  const auto found = std::ranges::find(families(), model_type, &Family::model_type);
  return found == families().end() ? nullptr : *found;
}

const Family* find_architecture(std::string_view name) {
  for (const Family* family : families()) {
    if (std::ranges::find(family->architectures, name) != family->architectures.end()) {
      return family;
    }
  }
  return nullptr;
}

// Each family's, quoted, joined by " or ".
template <typename NameOf>
std::string known(NameOf name_of) {
  std::vector<std::string> names;
  for (const Family* family : families()) names.push_back(quote(name_of(*family)));
  return fmt::format("{}", fmt::join(names, " or "));
}

}  // namespace

const Family& family_of(const JsonObject& root, const std::string& file) {
  const std::string types = known([](const Family& family) { return family.model_type; });
  const Family* family = nullptr;
  if (const std::optional<JsonValue> model_type = root.find_non_null("model_type")) {
    family = find_type(model_type->string());
    require(family != nullptr, ErrorKind::unsupported,
            "{}: \"model_type\" {} is not supported; expected {}", file,
            quote(model_type->string()), types);
  }
  const std::optional<JsonValue> names = root.find_non_null("architectures");
  for (const JsonValue& name : names ? names->array() : std::vector<JsonValue>{}) {
    const Family* named = find_architecture(name.string());
    require(named != nullptr && (family == nullptr || named == family), ErrorKind::unsupported,
            "{}: the architecture {} is not supported; expected {}", file, quote(name.string()),
            family != nullptr ? quote(family->architectures[0])
                              : known([](const Family& f) { return f.architectures[0]; }));
    family = named;
  }
  require(family != nullptr, ErrorKind::malformed,
          "{}: neither \"model_type\" nor \"architectures\" says what model this is; expected "
          "\"model_type\": {}",
          file, types);
  return *family;
}

const Family& family_of(const ModelConfig& config) {
  const Family* family = find_type(config.model_type);
  require(family != nullptr, ErrorKind::internal, "no family of models has the model_type {}",
          quote(config.model_type));
  return *family;
}

void add_family(const Family& family) { families().push_back(&family); }

}  // namespace clusterfusion
