// Input vectors of many rows as the tensor cores take them. A step of 32 columns has four pieces of
// eight columns of every row, [piece][lines][16 bytes], of which two are the 16 columns of a
// product: piece 2 c + h is columns 8 h to 8 h + 7, as the products count them, of chain c. That is
// columns 8 q + 4 c + 2 h and the next one for q = 0 to 3, as the streaming kernel shares out the
// 16 bytes that lane q loads.
#pragma once

#include <cstdint>

#include "sampling/host_device.hpp"

namespace clusterfusion::cuda::gemm {

inline constexpr int kStepPieces = 4;

// Rows that there is room for.
CF_HOST_DEVICE constexpr int input_lines(int rows) { return (rows + 7) / 8 * 8; }

// Where the word of elements 2 `pair` and 2 `pair` + 1 of a row lies.
CF_HOST_DEVICE constexpr std::int64_t input_word(int row, int pair, int lines) {
  const int piece = pair / 16 * kStepPieces + pair % 4;
  return (static_cast<std::int64_t>(piece) * lines + row) * 4 + pair % 16 / 4;
}

}  // namespace clusterfusion::cuda::gemm
