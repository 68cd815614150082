#include "io/safetensors.hpp"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include "base/fail.hpp"
#include "io/json.hpp"

namespace clusterfusion {
namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // as the reference implementation

struct DTypeBits {
  std::string_view name;
  std::int64_t bits;
};

constexpr std::array<DTypeBits, 22> kDTypes{{
    {"BOOL", 8},        {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"U8", 8},
    {"I8", 8},          {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"F8_E5M2FNUZ", 8}, {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},        {"U64", 64},
}};

std::int64_t bits_of_dtype(std::string_view dtype, const JsonValue& where) {
  for (const DTypeBits& known : kDTypes) {
    if (known.name == dtype) return known.bits;
  }
  fail(ErrorKind::unsupported, "{}: {} is no dtype of the safetensors format", where.where(),
       quote(dtype));
}

// Bytes of a tensor; nothing if the number overflows or does not fill whole bytes.
std::optional<std::uint64_t> bytes_of_shape(const std::vector<std::int64_t>& shape,
                                            std::int64_t bits) {
  std::int64_t total_bits = bits;
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) {
    if (__builtin_mul_overflow(count, extent, &count)) return std::nullopt;
  }
  if (__builtin_mul_overflow(count, bits, &total_bits)) return std::nullopt;
  if (total_bits % 8 != 0) return std::nullopt;
  return static_cast<std::uint64_t>(total_bits / 8);
}

std::string_view header_text(std::span<const std::byte> bytes, const std::string& file) {
  require(bytes.size() >= kLengthBytes, ErrorKind::malformed,
          "{}: expected a safetensors file, found {} bytes, fewer than the 8 of a header's length",
          file, bytes.size());
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) {
    length = length << 8 | std::to_integer<std::uint64_t>(bytes[i]);
  }
  require(length <= kMaxHeaderBytes, ErrorKind::malformed,
          "{}: expected a safetensors header of at most {} bytes, found {}: not a safetensors file",
          file, kMaxHeaderBytes, length);
  require(length <= bytes.size() - kLengthBytes, ErrorKind::malformed,
          "{}: truncated: its header should take {} bytes, but only {} follow", file, length,
          bytes.size() - kLengthBytes);
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()) + kLengthBytes, length);
  // Where files of JSON may have one.
  require(!text.starts_with("\xEF\xBB\xBF"), ErrorKind::malformed,
          "{}, header: broken JSON: it begins with a byte order mark", file);
  return text;
}

// One entry of the header; offsets are counted from the start of the data section still.
TensorEntry parse_tensor(const JsonValue& value, std::string_view name) {
  const JsonObject entry(value);
  TensorEntry tensor;
  tensor.name = name;
  tensor.dtype = entry.at("dtype").string();
  const std::int64_t bits = bits_of_dtype(tensor.dtype, value);
  for (const JsonValue& extent : entry.at("shape").array()) {
    tensor.shape.push_back(extent.integer());
  }
  const JsonValue offsets_value = entry.at("data_offsets");
  const std::vector<JsonValue> offsets = offsets_value.array();
  if (offsets.size() != 2) offsets_value.fail_expected("[begin, end]");
  tensor.begin = static_cast<std::size_t>(offsets[0].integer());
  tensor.end = static_cast<std::size_t>(offsets[1].integer());
  if (tensor.begin > tensor.end) offsets_value.fail_expected("[begin, end] with begin <= end");

  const std::optional<std::uint64_t> expected = bytes_of_shape(tensor.shape, bits);
  require(expected.has_value(), ErrorKind::malformed,
          "{}: shape [{}] of {} has no size in whole bytes that fits 64 bits", value.where(),
          fmt::join(tensor.shape, ", "), tensor.dtype);
  require(tensor.end - tensor.begin == *expected, ErrorKind::malformed,
          "{}: shape [{}] of {} takes {} bytes, but data_offsets [{}, {}] hold {}", value.where(),
          fmt::join(tensor.shape, ", "), tensor.dtype, *expected, tensor.begin, tensor.end,
          tensor.end - tensor.begin);
  return tensor;
}

// Every byte of the data section belongs to exactly one tensor.
void check_coverage(const std::vector<TensorEntry>& tensors, std::size_t data_bytes,
                    const std::string& file) {
  std::size_t covered = 0;
  std::string_view previous;
  for (const TensorEntry& tensor : tensors) {
    require(tensor.end <= data_bytes, ErrorKind::malformed,
            "{}: truncated: tensor {} should end at byte {} of the data, but there are only {}",
            file, quote(tensor.name), tensor.end, data_bytes);
    require(tensor.begin >= covered, ErrorKind::malformed,
            "{}: tensors {} and {} overlap: one ends at byte {} of the data, the other begins at "
            "{}",
            file, quote(previous), quote(tensor.name), covered, tensor.begin);
    require(tensor.begin == covered, ErrorKind::malformed,
            "{}: a hole of {} bytes before tensor {}: expected it to begin at byte {} of the data, "
            "found {}",
            file, tensor.begin - covered, quote(tensor.name), covered, tensor.begin);
    covered = tensor.end;
    previous = tensor.name;
  }
  require(covered == data_bytes, ErrorKind::malformed,
          "{}: oversized: its tensors take {} bytes, but {} follow the header", file, covered,
          data_bytes);
}

std::map<std::string, std::string> read_metadata(const JsonValue& metadata) {
  std::map<std::string, std::string> texts;
  if (metadata.is_null()) return texts;
  const JsonObject entries(metadata);
  for (const JsonObject::Member& member : entries.members()) {
    texts.emplace(member.first, entries.value_of(member).string());
  }
  return texts;
}

}  // namespace

std::map<std::string, std::string> safetensors_metadata(std::span<const std::byte> bytes,
                                                        const std::string& file) {
  const JsonDocument document(header_text(bytes, file), file + ", header");
  const auto metadata = JsonObject(document.root()).find("__metadata__");
  return metadata ? read_metadata(*metadata) : std::map<std::string, std::string>{};
}

std::vector<TensorEntry> parse_safetensors(std::span<const std::byte> bytes,
                                           const std::string& file) {
  const std::string_view header = header_text(bytes, file);
  const JsonDocument document(header, file + ", header");
  const JsonObject entries(document.root());

  std::vector<TensorEntry> tensors;
  tensors.reserve(entries.members().size());
  for (const JsonObject::Member& member : entries.members()) {
    const JsonValue value = entries.value_of(member);
    if (member.first == "__metadata__") {
      read_metadata(value);
    } else {
      tensors.push_back(parse_tensor(value, member.first));
    }
  }
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  const std::size_t data_start = kLengthBytes + header.size();
  check_coverage(tensors, bytes.size() - data_start, file);
  for (TensorEntry& tensor : tensors) {
    tensor.begin += data_start;
    tensor.end += data_start;
  }
  return tensors;
}

}  // namespace clusterfusion
