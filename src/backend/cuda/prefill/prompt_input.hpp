// What the kernels of a prefill are told of the prompts: tokens, their places in the KV cache, and
// how attention is shared out.
#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.hpp"
#include "backend/cuda/interventions/device_interventions.hpp"
#include "backend/cuda/memory.hpp"
#include "backend/cuda/prefill/attention.hpp"
#include "backend/cuda/prefill/row_kernels.hpp"

namespace clusterfusion::cuda {

// Tokens that follow each other in one sequence.
struct PromptPiece {
  std::span<const TokenId> tokens;
  std::int64_t first_position = 0;
  // One for each kKvPagePositions, enough for the new tokens; positions from first_position on may
  // hold anything before.
  std::span<char* const> pages;
  const DeviceInterventions* interventions = nullptr;  // may be null
  const PrefillOutput* output = nullptr;

  std::int64_t count() const noexcept { return std::ssize(tokens); }
  std::int64_t num_pages() const noexcept { return kv_pages_of(first_position + count()); }
};

// What the pieces of a pass take together.
struct PromptNeed {
  std::int64_t rows = 0, pages = 0;

  void add(const PromptPiece& piece) noexcept {
    rows += piece.count();
    pages += piece.num_pages();
  }
};

// One after the other, each aligned: counts first, then hands out.
class ScratchArena {
 public:
  explicit ScratchArena(char* base) : base_(base) {}
  template <typename T>
  void place(T*& pointer, std::int64_t bytes) {
    constexpr std::int64_t kAlignment = 256;
    if (base_ != nullptr) pointer = static_cast<T*>(static_cast<void*>(base_ + used_));
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  std::int64_t used() const noexcept { return used_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

class PromptInputs {
 public:
  // For passes of up to `max_rows` rows and sequences of up to `max_positions`; a block of
  // attention handles `tile_rows` queries. Errors: out_of_memory.
  PromptInputs(std::int64_t max_rows, std::int64_t max_positions, std::int64_t tile_rows);

  std::int64_t max_rows() const noexcept { return max_rows_; }
  bool fits(const PromptNeed& need) const noexcept {
    return need.rows <= max_rows_ && need.pages <= max_pages_;
  }

  // Sends the pieces' rows one after the other, padded to `rows`. What the call before has sent
  // must have arrived.
  void send(std::span<const PromptPiece> pieces, std::int64_t rows, cudaStream_t stream);

  // On the device, always at the same addresses.
  const PromptRow* rows() const noexcept { return on_device_.rows; }
  const QueryTile* tiles() const noexcept { return on_device_.tiles; }
  char* const* pages() const noexcept { return on_device_.pages; }
  // Of the last send(): as many as any single piece that is padded to as many rows has.
  std::int32_t num_tiles() const noexcept { return num_tiles_; }

 private:
  struct Arrays {
    char** pages = nullptr;
    QueryTile* tiles = nullptr;
    PromptRow* rows = nullptr;
  };
  std::int64_t place(ScratchArena arena, Arrays& arrays) const;
  std::int64_t bytes() const;

  std::int64_t max_rows_, max_pages_, tile_rows_;
  DeviceMemory memory_;
  PinnedMemory staging_;
  Arrays on_device_, staged_;
  std::int32_t num_tiles_ = 0;
};

}  // namespace clusterfusion::cuda
