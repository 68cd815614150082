// Whatever bytes a safetensors file holds: it is refused with an Error, or every tensor lies where
// the format allows it.
#include <simdjson.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "clusterfusion/error.hpp"
#include "io/safetensors.hpp"

namespace {

void check(bool condition) {
  if (!condition) std::abort();
}

void check_tensors(const std::vector<clusterfusion::TensorEntry>& tensors,
                   std::span<const std::byte> file) {
  if (tensors.empty()) return;
  check(tensors.front().begin >= 8);
  check(tensors.back().end == file.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    check(tensors[i].begin <= tensors[i].end);
    if (i > 0) check(tensors[i].begin == tensors[i - 1].end);
    for (const std::int64_t extent : tensors[i].shape) check(extent >= 0);
  }
}

void parse(std::span<const std::byte> file) {
  try {
    check_tensors(clusterfusion::parse_safetensors(file, "fuzz"), file);
  } catch (const clusterfusion::Error& error) {
    const std::string message = error.what();
    check(message.starts_with("fuzz"));
    check(simdjson::validate_utf8(message));
    check(error.kind() == clusterfusion::ErrorKind::malformed ||
          error.kind() == clusterfusion::ErrorKind::unsupported);
  }
}

// A file whose length field fits: the fuzzer need not find it. The first two bytes say how many
// bytes of data there are, the others are the header.
void parse_framed(std::span<const std::byte> input) {
  if (input.size() < 2) return;
  const std::span<const std::byte> header = input.subspan(2);
  const std::size_t data_bytes =
      std::to_integer<std::size_t>(input[0]) | std::to_integer<std::size_t>(input[1]) << 8;
  std::vector<std::byte> file(8 + header.size() + data_bytes);
  for (std::size_t i = 0; i < 8; ++i) file[i] = static_cast<std::byte>(header.size() >> (8 * i));
  if (!header.empty()) std::memcpy(file.data() + 8, header.data(), header.size());
  parse(file);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto input = std::as_bytes(std::span(data, size));
  parse(input);
  parse_framed(input);
  return 0;
}
