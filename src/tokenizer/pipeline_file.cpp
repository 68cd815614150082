#include "tokenizer/pipeline_file.hpp"

#include <array>
#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "base/fail.hpp"
#include "tokenizer/unicode_categories.hpp"
#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

constexpr int kMaxDepth = 16;  // of sequences within sequences

// A part and the members of its sequences, in order, for `read`.
template <typename Read>
void for_each_part(const JsonValue& value, std::string_view members, const Read& read,
                   int depth = 0) {
  const JsonObject object(value);
  if (object.at("type").string() != "Sequence") return read(object, value);
  if (depth == kMaxDepth) refuse_value(value, "a Sequence", "fewer within each other");
  for (const JsonValue& part : object.at(members).array()) {
    for_each_part(part, members, read, depth + 1);
  }
}

std::string text_of(const JsonObject& object, std::string_view key) {
  const JsonValue value = object.at(key);
  if (value.string().empty()) value.fail_expected("a text that is not empty");
  return std::string(value.string());
}

std::string one_character(const JsonObject& object, std::string_view key) {
  std::string text = text_of(object, key);
  std::size_t length = 0;
  decode_valid(text.data(), length);
  if (length != text.size()) object.at(key).fail_expected("one character");
  return text;
}

// {"String": ...} or {"Regex": ...}
Pattern read_pattern(const JsonObject& object) {
  const JsonValue value = object.at("pattern");
  const JsonObject pattern(value);
  if (pattern.find("String")) return {text_of(pattern, "String"), nullptr};
  if (const auto regex = pattern.find("Regex")) {
    return {"", std::make_shared<const Regex>(regex->string(), regex->where())};
  }
  value.fail_expected("an object with the key \"String\" or \"Regex\"");
}

template <typename Value, std::size_t size>
Value one_of(const JsonValue& value,
             const std::array<std::pair<std::string_view, Value>, size>& all,
             std::string_view supported) {
  for (const auto& [name, meaning] : all) {
    if (value.string() == name) return meaning;
  }
  refuse_value(value, value.string(), supported);
}

SplitBehavior read_behavior(const JsonValue& value) {
  constexpr std::array<std::pair<std::string_view, SplitBehavior>, 5> kBehaviors = {{
      {"Isolated", SplitBehavior::isolated},
      {"Removed", SplitBehavior::removed},
      {"Contiguous", SplitBehavior::contiguous},
      {"MergedWithPrevious", SplitBehavior::merged_with_previous},
      {"MergedWithNext", SplitBehavior::merged_with_next},
  }};
  return one_of(value, kBehaviors,
                "\"Isolated\", \"Removed\", \"Contiguous\", \"MergedWithPrevious\" or "
                "\"MergedWithNext\"");
}

// Files of old versions say "add_prefix_space" alone.
Metaspace::Prefix read_prefix(const JsonObject& object) {
  constexpr std::array<std::pair<std::string_view, Metaspace::Prefix>, 3> kPrefixes = {{
      {"always", Metaspace::Prefix::always},
      {"first", Metaspace::Prefix::first},
      {"never", Metaspace::Prefix::never},
  }};
  if (const auto scheme = object.find_non_null("prepend_scheme")) {
    return one_of(*scheme, kPrefixes, "\"always\", \"first\" or \"never\"");
  }
  return flag_or(object, "add_prefix_space", true) ? Metaspace::Prefix::always
                                                   : Metaspace::Prefix::never;
}

PreTokenizerStep read_split(const JsonObject& part) {
  return Split{read_pattern(part), read_behavior(part.at("behavior")),
               flag_or(part, "invert", false)};
}

PreTokenizerStep read_pre_tokenizer_step(const JsonObject& part) {
  const JsonValue type = part.at("type");
  const std::string_view name = type.string();
  if (name == "Split") return read_split(part);
  if (name == "ByteLevel") {
    return ByteLevel{part.at("add_prefix_space").boolean(), flag_or(part, "use_regex", true)};
  }
  if (name == "Metaspace") {
    return Metaspace{one_character(part, "replacement"), read_prefix(part),
                     flag_or(part, "split", true)};
  }
  if (name == "Digits") {
    const bool is_each_one = flag_or(part, "individual_digits", false);
    return Split{code_points_with(CodePointProperty::numeric),
                 is_each_one ? SplitBehavior::isolated : SplitBehavior::contiguous, false};
  }
  if (name == "Punctuation") {
    const auto behavior = part.find_non_null("behavior");
    return Split{code_points_with(CodePointProperty::punctuation),
                 behavior ? read_behavior(*behavior) : SplitBehavior::isolated, false};
  }
  if (name == "WhitespaceSplit") return Split{white_space(), SplitBehavior::removed, false};
  refuse_value(type, name,
               "null, \"ByteLevel\", \"Split\", \"Metaspace\", \"Digits\", \"Punctuation\", "
               "\"WhitespaceSplit\" or a \"Sequence\" of them");
}

// Reads the members of a decoder into a DecoderSpec, whose order they must have.
class DecoderReader {
 public:
  void read(const JsonObject& part, const JsonValue& value) {
    const JsonValue type = part.at("type");
    const std::string_view name = type.string();
    if (name == "ByteLevel") {
      if (spec_.byte_fallback || is_fused_ || !spec_.token_steps.empty()) refuse_order(value, name);
      spec_.is_byte_level = is_fused_ = true;
    } else if (name == "Fuse") {
      is_fused_ = true;
    } else if (name == "ByteFallback") {
      if (is_fused_) refuse_order(value, name);
      spec_.byte_fallback = true;
    } else if (name == "Strip") {
      read_strip(part, value);
    } else if (name == "Replace") {
      add_token_step(Replace{read_pattern(part), std::string(part.at("content").string())}, value,
                     name);
    } else if (name == "Metaspace") {
      add_token_step(DecoderSpec::MetaspaceStep{one_character(part, "replacement"),
                                                read_prefix(part) != Metaspace::Prefix::never},
                     value, name);
    } else {
      refuse_value(type, name,
                   "\"ByteLevel\", \"Replace\", \"Metaspace\", \"Strip\", \"ByteFallback\", "
                   "\"Fuse\" or a \"Sequence\" of them");
    }
  }

  DecoderSpec take() { return std::move(spec_); }

 private:
  [[noreturn]] static void refuse_order(const JsonValue& value, std::string_view name) {
    fail(ErrorKind::unsupported,
         "{}: \"{}\" behind what stands before it is not supported; supported: \"ByteLevel\" "
         "alone, or \"Replace\", \"Metaspace\" and \"Strip\", then \"ByteFallback\", then "
         "\"Fuse\", then \"Strip\"",
         value.where(), name);
  }

  void add_token_step(DecoderSpec::TokenStep step, const JsonValue& value, std::string_view name) {
    if (is_fused_ || spec_.byte_fallback) refuse_order(value, name);
    spec_.token_steps.push_back(std::move(step));
  }

  void read_strip(const JsonObject& part, const JsonValue& value) {
    constexpr IntegerRange kCounts{0, std::numeric_limits<std::int32_t>::max()};
    const DecoderSpec::StripStep strip{one_character(part, "content"),
                                       static_cast<std::size_t>(part.at("start").integer(kCounts)),
                                       static_cast<std::size_t>(part.at("stop").integer(kCounts))};
    if (!is_fused_) return add_token_step(strip, value, "Strip");
    if (!spec_.text_edges.content.empty()) refuse_order(value, "Strip");
    spec_.text_edges = strip;
  }

  DecoderSpec spec_;
  bool is_fused_ = false;  // all tokens are one
};

}  // namespace

void refuse_value(const JsonValue& value, std::string_view found, std::string_view supported) {
  fail(ErrorKind::unsupported, "{} is {}, which is not supported; supported: {}", value.where(),
       quote(found), supported);
}

bool flag_or(const JsonObject& object, std::string_view key, bool absent) {
  const std::optional<JsonValue> value = object.find_non_null(key);
  return value ? value->boolean() : absent;
}

std::vector<NormalizerStep> read_normalizer(const JsonValue& value) {
  std::vector<NormalizerStep> steps;
  for_each_part(value, "normalizers", [&](const JsonObject& part, const JsonValue&) {
    const JsonValue type = part.at("type");
    const std::string_view name = type.string();
    if (name == "NFC") {
      steps.emplace_back(NormalizationForm::nfc);
    } else if (name == "NFKC") {
      steps.emplace_back(NormalizationForm::nfkc);
    } else if (name == "Prepend") {
      steps.emplace_back(Prepend{std::string(part.at("prepend").string())});
    } else if (name == "Replace") {
      steps.emplace_back(Replace{read_pattern(part), std::string(part.at("content").string())});
    } else if (name == "Strip") {
      steps.emplace_back(Strip{part.at("strip_left").boolean(), part.at("strip_right").boolean()});
    } else {
      refuse_value(type, name,
                   "null, \"NFC\", \"NFKC\", \"Prepend\", \"Replace\", \"Strip\" or a \"Sequence\" "
                   "of them");
    }
  });
  return steps;
}

PreTokenizer read_pre_tokenizer(const JsonValue& value) {
  std::vector<PreTokenizerStep> steps;
  for_each_part(value, "pretokenizers", [&](const JsonObject& part, const JsonValue& place) {
    if (PreTokenizer(steps).is_byte_level()) {
      fail(ErrorKind::unsupported,
           "{} stands behind a \"ByteLevel\", which is not supported; supported: \"ByteLevel\" as "
           "the last",
           place.where());
    }
    steps.push_back(read_pre_tokenizer_step(part));
  });
  return PreTokenizer(std::move(steps));
}

DecoderSpec read_decoder(const JsonValue& value) {
  DecoderReader reader;
  for_each_part(value, "decoders",
                [&](const JsonObject& part, const JsonValue& place) { reader.read(part, place); });
  return reader.take();
}

}  // namespace clusterfusion
