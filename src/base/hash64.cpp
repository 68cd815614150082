#include "base/hash64.hpp"

#include <array>
#include <bit>
#include <cstring>

namespace clusterfusion {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr std::uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr std::uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr std::uint64_t kPrime3 = 0x165667B19E3779F9u;
constexpr std::uint64_t kPrime4 = 0x85EBCA77C2B2AE63u;
constexpr std::uint64_t kPrime5 = 0x27D4EB2F165667C5u;

template <typename T>
T take(std::span<const std::byte>& bytes) noexcept {
  T value;
  std::memcpy(&value, bytes.data(), sizeof(T));
  bytes = bytes.subspan(sizeof(T));
  return value;
}

std::uint64_t round(std::uint64_t sum, std::uint64_t lane) noexcept {
  return std::rotl(sum + lane * kPrime2, 31) * kPrime1;
}

// Takes all whole stripes of 32 bytes.
std::uint64_t hash_stripes(std::span<const std::byte>& bytes, std::uint64_t seed) noexcept {
  std::array<std::uint64_t, 4> sums{seed + kPrime1 + kPrime2, seed + kPrime2, seed, seed - kPrime1};
  while (bytes.size() >= 32) {
    for (std::uint64_t& sum : sums) sum = round(sum, take<std::uint64_t>(bytes));
  }
  std::uint64_t hash = std::rotl(sums[0], 1) + std::rotl(sums[1], 7) + std::rotl(sums[2], 12) +
                       std::rotl(sums[3], 18);
  for (const std::uint64_t sum : sums) hash = (hash ^ round(0, sum)) * kPrime1 + kPrime4;
  return hash;
}

}  // namespace

std::uint64_t hash64(std::span<const std::byte> bytes, std::uint64_t seed) noexcept {
  const std::uint64_t size = bytes.size();
  std::uint64_t hash = size >= 32 ? hash_stripes(bytes, seed) : seed + kPrime5;
  hash += size;
  while (bytes.size() >= 8) {
    hash = std::rotl(hash ^ round(0, take<std::uint64_t>(bytes)), 27) * kPrime1 + kPrime4;
  }
  if (bytes.size() >= 4) {
    hash = std::rotl(hash ^ take<std::uint32_t>(bytes) * kPrime1, 23) * kPrime2 + kPrime3;
  }
  while (!bytes.empty()) {
    hash = std::rotl(hash ^ take<std::uint8_t>(bytes) * kPrime5, 11) * kPrime1;
  }
  hash = (hash ^ hash >> 33) * kPrime2;
  hash = (hash ^ hash >> 29) * kPrime3;
  return hash ^ hash >> 32;
}

}  // namespace clusterfusion
