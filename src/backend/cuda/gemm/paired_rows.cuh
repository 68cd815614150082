// Input vectors of many rows as the tensor cores take them: rows r and r + 8 of each 16 share their
// 16 bytes. "Line" h 8 + g of 16 rows has, of rows g and g + 8, from each 8 elements those from 4 h
// on: words (row g: 0, 1), (row g + 8: 0, 1), (row g: 2, 3), (row g + 8: 2, 3), which are operand A
// of m16n8k16 as they lie. A line is as long as a row.
#pragma once

#include <cstdint>

namespace clusterfusion::cuda::gemm {

// Where the word of elements 2 `pair` and 2 `pair` + 1 of a row lies, if a row has `pairs` words.
__device__ __forceinline__ std::int64_t paired_word(int row, int pair, int pairs) {
  const int half = pair % 4 / 2;
  const int line = row / 16 * 16 + half * 8 + row % 8;
  const int word = pair % 2 * 2 + row % 16 / 8;
  return static_cast<std::int64_t>(line) * pairs + pair / 4 * 4 + word;
}

}  // namespace clusterfusion::cuda::gemm
