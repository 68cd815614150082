#include "tokenizer/nfc.hpp"

#include <utf8proc.h>

#include <algorithm>
#include <vector>

#include "base/fail.hpp"
#include "tokenizer/unicode_properties.hpp"
#include "tokenizer/utf8.hpp"

namespace clusterfusion {
namespace {

// A normalization form, and what it may change.
class Form {
 public:
  explicit Form(NormalizationForm form) : is_compatible_(form == NormalizationForm::nfkc) {}

  // Lead bytes below this start code points that the form leaves alone.
  unsigned char first_sensitive_lead() const noexcept { return is_compatible_ ? 0xC2 : 0xCC; }
  bool is_sensitive(char32_t c) const noexcept {
    return properties_.is_normalization_sensitive(c) ||
           (is_compatible_ && properties_.is_compatibility(c));
  }
  bool is_base(char32_t c) const noexcept { return properties_.is_normalization_base(c); }
  utf8proc_option_t options() const noexcept {
    return static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE |
                                          (is_compatible_ ? UTF8PROC_COMPAT : 0));
  }
  // Of one code point (UAX #15).
  int longest_decomposition() const noexcept { return is_compatible_ ? 18 : 4; }

 private:
  bool is_compatible_;
  const UnicodeProperties& properties_ = UnicodeProperties::get();
};

// A stretch of text that the form may change: sensitive characters and the one before them.
struct Stretch {
  std::size_t begin, end;
};

// The first stretch at or after `from`, or an empty one at the end.
Stretch find_stretch(std::string_view text, std::size_t from, const Form& form) {
  std::size_t previous = from;
  bool previous_is_base = false;
  std::size_t position = from;
  while (position < text.size()) {
    std::size_t length = 1;
    const auto lead = static_cast<unsigned char>(text[position]);
    char32_t code_point = lead;
    if (lead >= 0x80) code_point = decode_valid(text.data() + position, length);
    if (lead >= form.first_sensitive_lead() && form.is_sensitive(code_point)) break;
    previous = position;
    previous_is_base = form.is_base(code_point);
    position += length;
  }
  Stretch stretch{previous_is_base ? previous : position, position};
  while (stretch.end < text.size()) {
    std::size_t length = 0;
    const char32_t code_point = decode_valid(text.data() + stretch.end, length);
    if (!form.is_sensitive(code_point)) break;
    stretch.end += length;
  }
  if (position == text.size()) stretch.begin = position;
  return stretch;
}

bool is_combining(utf8proc_int32_t code_point) {
  return utf8proc_get_property(code_point)->combining_class != 0;
}

// Canonical ordering. utf8proc orders by insertion, which a long run of marks makes quadratic; of
// what is sorted already it only makes sure.
void order_marks(std::vector<utf8proc_int32_t>& code_points) {
  auto begin = code_points.begin();
  while (begin != code_points.end()) {
    const auto run = std::find_if(begin, code_points.end(), is_combining);
    const auto run_end = std::find_if_not(run, code_points.end(), is_combining);
    std::stable_sort(run, run_end, [](utf8proc_int32_t left, utf8proc_int32_t right) {
      return utf8proc_get_property(left)->combining_class <
             utf8proc_get_property(right)->combining_class;
    });
    begin = run_end;
  }
}

void append_normalized(std::string_view stretch, const Form& form, std::string& out) {
  const int longest = form.longest_decomposition();
  std::vector<utf8proc_int32_t> code_points;
  for (std::size_t position = 0, length = 0; position < stretch.size(); position += length) {
    const char32_t c = decode_valid(stretch.data() + position, length);
    const std::size_t size = code_points.size();
    code_points.resize(size + static_cast<std::size_t>(longest));
    int boundary_class = 0;
    const utf8proc_ssize_t count =
        utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c), code_points.data() + size,
                                longest, form.options(), &boundary_class);
    require(count >= 0 && count <= longest, ErrorKind::internal,
            "tokenizer: utf8proc could not decompose U+{:04X}", static_cast<std::uint32_t>(c));
    code_points.resize(size + static_cast<std::size_t>(count));
  }
  order_marks(code_points);
  const utf8proc_ssize_t count = utf8proc_normalize_utf32(
      code_points.data(), static_cast<utf8proc_ssize_t>(code_points.size()), form.options());
  require(count >= 0, ErrorKind::internal, "tokenizer: utf8proc could not compose: {}",
          utf8proc_errmsg(count));
  for (utf8proc_ssize_t i = 0; i < count; ++i) {
    utf8proc_uint8_t bytes[4];
    const utf8proc_ssize_t length = utf8proc_encode_char(code_points[i], bytes);
    out.append(reinterpret_cast<const char*>(bytes), static_cast<std::size_t>(length));
  }
}

}  // namespace

std::optional<std::string> to_form(NormalizationForm name, std::string_view text) {
  const Form form(name);
  Stretch stretch = find_stretch(text, 0, form);
  if (stretch.begin == text.size()) return std::nullopt;

  std::string out;
  out.reserve(text.size());
  std::size_t done = 0;
  while (stretch.begin < text.size()) {
    out += text.substr(done, stretch.begin - done);
    append_normalized(text.substr(stretch.begin, stretch.end - stretch.begin), form, out);
    done = stretch.end;
    stretch = find_stretch(text, done, form);
  }
  out += text.substr(done);
  return out;
}

}  // namespace clusterfusion
