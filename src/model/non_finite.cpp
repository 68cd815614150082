#include "model/non_finite.hpp"

#include <algorithm>
#include <limits>

#include "base/tensor_view.hpp"

namespace clusterfusion {
namespace {

// A value is finite unless all bits of its exponent are set; then it is infinite if no bit of its
// fraction is set.
template <typename Bits>
std::optional<NonFinite> search(const DLTensor& tensor, Bits exponent, Bits sign) {
  constexpr std::int64_t kBlock = 4096;  // no branch inside a block: the compiler vectorises it
  const Bits* values = reinterpret_cast<const Bits*>(data_of(tensor));
  const std::int64_t count = num_elements(tensor);
  const auto is_non_finite = [exponent](Bits bits) { return (bits & exponent) == exponent; };
  for (std::int64_t start = 0; start < count; start += kBlock) {
    const Bits* begin = values + start;
    const Bits* end = values + std::min(start + kBlock, count);
    bool found = false;
    for (const Bits* bits = begin; bits != end; ++bits) found |= is_non_finite(*bits);
    if (!found) continue;
    const Bits* first = std::find_if(begin, end, is_non_finite);
    const Bits magnitude = *first & static_cast<Bits>(~sign);
    const float value = magnitude == exponent ? std::numeric_limits<float>::infinity()
                                              : std::numeric_limits<float>::quiet_NaN();
    return NonFinite{first - values, (*first & sign) != 0 ? -value : value};
  }
  return std::nullopt;
}

}  // namespace

std::optional<NonFinite> first_non_finite(const DLTensor& tensor) {
  switch (dtype_of(tensor).value()) {
    case DType::float16: return search<std::uint16_t>(tensor, 0x7C00, 0x8000);
    case DType::bfloat16: return search<std::uint16_t>(tensor, 0x7F80, 0x8000);
    case DType::float32: break;
  }
  return search<std::uint32_t>(tensor, 0x7F800000, 0x80000000);
}

}  // namespace clusterfusion
