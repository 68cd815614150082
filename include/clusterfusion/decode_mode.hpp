// How a GPU decodes several sequences.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace clusterfusion {

// Within a mode a text depends on its request alone, bit for bit: on no other sequence beside it.
// The two modes add up numbers in different orders, so between them texts may differ in a last bit.
// On the CPU, and on a GPU that has no kernel for many rows, they are the same.
enum class DecodeMode : std::int32_t {
  // One sequence after the other, each by the kernel for a single row: the shortest time a token.
  latency,
  // Up to 256 sequences in a step, which reads the weights once for all of them: up to 16 in one
  // launch, more by a series of kernels, with the same bits.
  throughput,
};
constexpr const char* name_of(DecodeMode mode) noexcept {
  return mode == DecodeMode::latency ? "latency" : "throughput";
}
// The mode of that name; nothing if there is none.
constexpr std::optional<DecodeMode> decode_mode_of(std::string_view name) noexcept {
  for (const DecodeMode mode : {DecodeMode::latency, DecodeMode::throughput})
    if (name == name_of(mode)) return mode;
  return std::nullopt;
}

}  // namespace clusterfusion
