#include "tokenizer/unicode_properties.hpp"

#include <algorithm>
#include <memory>

namespace clusterfusion {
namespace {

struct PropertyRange {
  char32_t first, last;
  std::uint8_t bits;
};

constexpr PropertyRange kPropertyRanges[] = {
#include "tokenizer/unicode_table.inc"
};

}  // namespace

UnicodeProperties::UnicodeProperties() {
  for (const PropertyRange& range : kPropertyRanges) {
    std::fill(bits_ + range.first, bits_ + range.last + 1, range.bits);
  }
}

const UnicodeProperties& UnicodeProperties::get() {
  static const std::unique_ptr<const UnicodeProperties> table(new UnicodeProperties);
  return *table;
}

}  // namespace clusterfusion
