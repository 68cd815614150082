// Strings to ids: a flat hash table over strings that live elsewhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "clusterfusion/model.hpp"

namespace clusterfusion {

// Spreads the bytes of a short string over 64 bits (multiply and fold, as in wyhash).
inline std::uint64_t hash_bytes(std::string_view bytes) noexcept {
  constexpr std::uint64_t kMultiplier = 0x9E3779B97F4A7C15u;
  std::uint64_t hash = bytes.size() * kMultiplier;
  const auto mix = [&hash](std::uint64_t word) {
    hash = (hash ^ word) * kMultiplier;
    hash ^= hash >> 32;
  };
  const char* data = bytes.data();
  std::size_t left = bytes.size();
  for (; left >= 8; data += 8, left -= 8) {
    std::uint64_t word;
    std::memcpy(&word, data, 8);
    mix(word);
  }
  if (left >= 4) {
    std::uint32_t low, high;
    std::memcpy(&low, data, 4);
    std::memcpy(&high, data + left - 4, 4);
    mix(std::uint64_t{high} << 32 | low);
  } else if (left > 0) {
    const auto byte = [data](std::size_t i) { return static_cast<unsigned char>(data[i]); };
    mix(std::uint64_t{byte(0)} << 16 | std::uint64_t{byte(left / 2)} << 8 | byte(left - 1));
  }
  return hash;
}

// Insert-only. `strings` must keep its elements in place while the table is used.
class StringTable {
 public:
  explicit StringTable(const std::vector<std::string>& strings)
      : strings_(&strings), slots_(kMinSlots) {}

  void reserve(std::size_t count) {
    while (slots_.size() < 2 * count) grow();
  }

  // Adds strings[id]. Returns false, and changes nothing, if an equal string is there already.
  bool insert(TokenId id) {
    if (2 * (count_ + 1) > slots_.size()) grow();
    const std::string_view key = (*strings_)[id];
    const std::uint64_t hash = hash_bytes(key);
    Slot& slot = slots_[index_of(key, hash)];
    if (slot.id >= 0) return false;
    slot = {static_cast<std::uint32_t>(hash), id};
    ++count_;
    return true;
  }

  std::optional<TokenId> find(std::string_view key) const noexcept {
    const TokenId id = slots_[index_of(key, hash_bytes(key))].id;
    if (id < 0) return std::nullopt;
    return id;
  }

 private:
  static constexpr std::size_t kMinSlots = 16;

  struct Slot {
    std::uint32_t tag = 0;  // the low half of the hash
    TokenId id = -1;        // -1: free
  };

  // Where `key` is, or the free slot where it would be.
  std::size_t index_of(std::string_view key, std::uint64_t hash) const noexcept {
    const auto tag = static_cast<std::uint32_t>(hash);
    const std::size_t mask = slots_.size() - 1;
    std::size_t index = (hash >> 32) & mask;
    while (slots_[index].id >= 0 &&
           (slots_[index].tag != tag || (*strings_)[slots_[index].id] != key)) {
      index = (index + 1) & mask;
    }
    return index;
  }

  void grow() {
    const std::vector<Slot> old = std::exchange(slots_, std::vector<Slot>(2 * slots_.size()));
    for (const Slot& slot : old) {
      if (slot.id < 0) continue;
      const std::string_view key = (*strings_)[slot.id];
      slots_[index_of(key, hash_bytes(key))] = slot;
    }
  }

  const std::vector<std::string>* strings_;
  std::vector<Slot> slots_;
  std::size_t count_ = 0;
};

}  // namespace clusterfusion
