#include "backend/cuda/prefill/prompt_input.hpp"

#include <algorithm>

#include "backend/cuda/check.hpp"

namespace clusterfusion::cuda {
namespace {

template <typename T>
void copy(T* to, const T* from, std::int64_t count, cudaStream_t stream) {
  check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(count) * sizeof(T),
                        cudaMemcpyHostToDevice, stream),
        "sending a prompt");
}

}  // namespace

// Pieces of many sequences take a page each, or many; one piece always fits.
PromptInputs::PromptInputs(std::int64_t max_rows, std::int64_t max_positions,
                           std::int64_t tile_rows)
    : max_rows_(max_rows),
      max_pages_(max_rows + kv_pages_of(max_positions)),
      tile_rows_(tile_rows),
      memory_(bytes(), "the tables of prompts"),
      staging_(bytes(), "prompts") {
  place(ScratchArena(memory_.as<>()), on_device_);
  place(ScratchArena(staging_.as<>()), staged_);
}

std::int64_t PromptInputs::place(ScratchArena arena, Arrays& arrays) const {
  arena.place(arrays.pages, max_pages_ * static_cast<std::int64_t>(sizeof(char*)));
  arena.place(arrays.tiles, max_rows_ * static_cast<std::int64_t>(sizeof(QueryTile)));
  arena.place(arrays.rows, max_rows_ * static_cast<std::int64_t>(sizeof(PromptRow)));
  return arena.used();
}

std::int64_t PromptInputs::bytes() const {
  Arrays nowhere;
  return place(ScratchArena(nullptr), nowhere);
}

void PromptInputs::send(std::span<const PromptPiece> pieces, std::int64_t rows,
                        cudaStream_t stream) {
  std::int32_t pages = 0, row = 0;
  num_tiles_ = 0;
  for (const PromptPiece& piece : pieces) {
    std::copy_n(piece.pages.begin(), piece.num_pages(), staged_.pages + pages);
    auto position = static_cast<std::int32_t>(piece.first_position);
    const auto end = position + static_cast<std::int32_t>(piece.count());
    for (std::int32_t first = position; first < end;
         first += static_cast<std::int32_t>(tile_rows_)) {
      const auto count = std::min(static_cast<std::int32_t>(tile_rows_), end - first);
      staged_.tiles[num_tiles_++] = {row + first - position, count, first, pages};
    }
    for (const TokenId token : piece.tokens) staged_.rows[row++] = {token, position++, pages};
    pages += static_cast<std::int32_t>(piece.num_pages());
  }
  // Those with most keys take longest.
  std::stable_sort(staged_.tiles, staged_.tiles + num_tiles_,
                   [](const QueryTile& a, const QueryTile& b) { return a.position > b.position; });
  for (; row < rows; ++row) staged_.rows[row] = {0, -1, 0};
  const auto padded_tiles = static_cast<std::int32_t>((rows + tile_rows_ - 1) / tile_rows_);
  while (num_tiles_ < padded_tiles) staged_.tiles[num_tiles_++] = {};
  copy(on_device_.pages, staged_.pages, pages, stream);
  copy(on_device_.tiles, staged_.tiles, num_tiles_, stream);
  copy(on_device_.rows, staged_.rows, rows, stream);
}

}  // namespace clusterfusion::cuda
