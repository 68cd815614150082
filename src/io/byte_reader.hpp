// Little-endian numbers and runs of bytes, read one after the other from a file's bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/fail.hpp"

namespace clusterfusion {

class ByteReader {
 public:
  // `where` stands for the bytes in messages; positions in messages count from their start.
  ByteReader(std::span<const std::byte> bytes, std::string where, std::size_t position = 0)
      : bytes_(bytes), where_(std::move(where)), position_(position) {}

  std::size_t position() const noexcept { return position_; }
  bool at_end() const noexcept { return position_ >= bytes_.size(); }
  const std::string& where() const noexcept { return where_; }

  // The next `count` bytes. Errors: malformed if there are fewer; `what` names them.
  std::span<const std::byte> take(std::uint64_t count, const char* what) {
    const std::size_t left = position_ < bytes_.size() ? bytes_.size() - position_ : 0;
    require(count <= left, ErrorKind::malformed,
            "{}: truncated: expected {} bytes of {} at byte {}, found {}", where_, count, what,
            position_, left);
    const auto taken = bytes_.subspan(position_, static_cast<std::size_t>(count));
    position_ += taken.size();
    return taken;
  }
  std::string_view text(std::uint64_t count, const char* what) {
    const auto taken = take(count, what);
    return {reinterpret_cast<const char*>(taken.data()), taken.size()};
  }
  // A number of `count` <= 8 bytes.
  std::uint64_t number(std::size_t count, const char* what) {
    const auto taken = take(count, what);
    std::uint64_t value = 0;
    for (std::size_t i = taken.size(); i-- > 0;) {
      value = value << 8 | std::to_integer<std::uint64_t>(taken[i]);
    }
    return value;
  }
  // Up to the next line feed, which is read too.
  std::string_view line(const char* what) {
    const std::string_view rest{reinterpret_cast<const char*>(bytes_.data()) + position_,
                                bytes_.size() - position_};
    const std::size_t length = rest.find('\n');
    require(length != rest.npos, ErrorKind::malformed,
            "{}: truncated: expected a line with {} at byte {}, found no end of it", where_, what,
            position_);
    position_ += length + 1;
    return rest.substr(0, length);
  }

 private:
  std::span<const std::byte> bytes_;
  std::string where_;
  std::size_t position_;
};

}  // namespace clusterfusion
