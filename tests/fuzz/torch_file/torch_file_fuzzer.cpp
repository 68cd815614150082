// Whatever bytes a file of torch's holds: it is refused with an Error, or every tensor lies inside
// the file and is as large as its shape and strides say.
#include <simdjson.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "clusterfusion/error.hpp"
#include "io/torch_file.hpp"

namespace {

void check(bool condition) {
  if (!condition) std::abort();
}

std::int64_t bytes_of(std::string_view dtype) {
  if (dtype == "F64" || dtype == "I64") return 8;
  if (dtype == "F32" || dtype == "I32") return 4;
  return dtype == "F16" || dtype == "BF16" || dtype == "I16" ? 2 : 1;
}

void check_tensor(const clusterfusion::TensorEntry& tensor, std::span<const std::byte> file) {
  check(simdjson::validate_utf8(tensor.name));
  check(tensor.begin <= tensor.end && tensor.end <= file.size());
  check(tensor.strides.empty() || tensor.strides.size() == tensor.shape.size());
  std::int64_t count = 1;
  std::int64_t last = 0;
  for (std::size_t axis = 0; axis < tensor.shape.size(); ++axis) {
    check(tensor.shape[axis] >= 0);
    check(!__builtin_mul_overflow(count, tensor.shape[axis], &count));
    if (!tensor.strides.empty()) last += (tensor.shape[axis] - 1) * tensor.strides[axis];
  }
  const std::int64_t elements = tensor.strides.empty() || count == 0 ? count : last + 1;
  const auto bytes = static_cast<std::int64_t>(tensor.end - tensor.begin);
  check(bytes == elements * bytes_of(tensor.dtype));
}

void parse(std::span<const std::byte> file) {
  try {
    for (const auto& tensor : clusterfusion::parse_torch_file(file, "fuzz")) {
      check_tensor(tensor, file);
    }
  } catch (const clusterfusion::Error& error) {
    const std::string message = error.what();
    check(message.starts_with("fuzz"));
    check(simdjson::validate_utf8(message));
    check(error.kind() == clusterfusion::ErrorKind::malformed ||
          error.kind() == clusterfusion::ErrorKind::unsupported);
  }
}

std::string little(std::uint64_t value, int bytes) {
  std::string text;
  for (int i = 0; i < bytes; ++i) text += static_cast<char>(value >> (8 * i));
  return text;
}

// A file whose archive is in order: the fuzzer need not find it. The input is its pickle.
void parse_framed(std::string_view pickle) {
  const std::string storage(40, 's');
  const std::array<std::pair<std::string_view, std::string_view>, 4> entries{
      {{"a/data.pkl", pickle}, {"a/data/0", storage}, {"a/data/1", "abc"}, {"a/version", "3"}}};
  std::string file;
  std::string directory;
  for (const auto& [name, content] : entries) {
    const std::string sizes = std::string(12, '\0') + little(content.size(), 4) +
                              little(content.size(), 4) + little(name.size(), 2);
    directory.append("PK\1\2").append(little(0, 4)).append(sizes).append(std::string(12, '\0'));
    directory.append(little(file.size(), 4)).append(name);
    file.append("PK\3\4").append(little(0, 2)).append(sizes).append(little(0, 2));
    file.append(name).append(content);
  }
  const std::string end = little(0, 4) + little(entries.size(), 2) + little(entries.size(), 2) +
                          little(directory.size(), 4) + little(file.size(), 4) + little(0, 2);
  file.append(directory).append("PK\5\6").append(end);
  parse(std::as_bytes(std::span(file)));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  parse(std::as_bytes(std::span(data, size)));
  parse_framed({reinterpret_cast<const char*>(data), size});
  return 0;
}
