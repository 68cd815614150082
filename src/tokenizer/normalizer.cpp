#include "tokenizer/normalizer.hpp"

#include "tokenizer/unicode_properties.hpp"
#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

// A text that a step has changed, or nothing.
using Changed = std::optional<std::string>;

Changed apply(NormalizationForm form, std::string_view text) { return to_form(form, text); }

Changed apply(const Prepend& prepend, std::string_view text) {
  if (text.empty()) return std::nullopt;
  return std::string(prepend.prefix).append(text);
}

Changed apply(const Replace& replace, std::string_view text) {
  return replace.pattern.replaced(text, replace.content);
}

Changed apply(const Strip& strip, std::string_view text) {
  const UnicodeProperties& properties = UnicodeProperties::get();
  std::size_t length = 0;
  while (strip.left && !text.empty() && properties.is_space(decode_valid(text.data(), length))) {
    text.remove_prefix(length);
  }
  while (strip.right && !text.empty() && properties.is_space(decode_last_valid(text, length))) {
    text.remove_suffix(length);
  }
  return std::string(text);
}

}  // namespace

std::vector<TextPart> Pattern::find_all(std::string_view in) const {
  if (regex) return regex->find_all(in);
  std::vector<TextPart> parts;
  std::size_t done = 0;
  for (std::size_t at = in.find(text); at != in.npos; at = in.find(text, done)) {
    if (done < at) parts.push_back({done, at, false});
    done = at + text.size();
    parts.push_back({at, done, true});
  }
  if (done < in.size()) parts.push_back({done, in.size(), false});
  return parts;
}

std::string Pattern::replaced(std::string_view in, std::string_view content) const {
  std::string out;
  out.reserve(in.size());
  for (const TextPart& part : find_all(in)) {
    out += part.is_match ? content : in.substr(part.begin, part.end - part.begin);
  }
  return out;
}

std::optional<std::string> normalize(const std::vector<NormalizerStep>& steps,
                                     std::string_view text) {
  Changed result;
  for (const NormalizerStep& step : steps) {
    const std::string_view current = result ? std::string_view(*result) : text;
    const auto apply_step = [&](const auto& one) { return apply(one, current); };
    if (Changed changed = std::visit(apply_step, step)) result = std::move(changed);
  }
  return result;
}

}  // namespace clusterfusion
