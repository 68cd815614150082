// What the kernel that multiplies many rows by a layer's matrices is told.
#pragma once

#include <cstdint>

#include "clusterfusion/model.hpp"
#include "plan/stream_plan.hpp"

namespace clusterfusion::cuda {

inline constexpr std::int32_t kMaxProductOperands = plan::kMaxResidualParts;

// A matrix, or one part of its columns, and the input vectors that it multiplies.
struct ProductOperand {
  plan::Stream stream;
  const char* weights;  // 16-bit; where the part's columns begin
  const float* biases;  // [rows], or null: none, or another part adds them
  const char* input;    // 16-bit, in paired_rows; of the first row of the step
  char* output;         // of the first row of the step: float32, or 16-bit behind an activation
  std::int32_t row_bytes, input_row_bytes;
  std::int32_t rows;                             // of the matrix
  std::int32_t output_row;                       // elements from row to row of the output
  std::int32_t pieces, iterations, piece_steps;  // plan::ProductCut
  std::int32_t chunks;
  std::int32_t tiles;  // of so many chunks that a block computes
};

// Products that can be computed at the same time.
struct ProductParams {
  ProductOperand operands[kMaxProductOperands];
  std::int32_t count;        // of operands
  std::int32_t rows;         // of the step
  std::int32_t lines;        // of paired_rows.cuh: as many, rounded up to 16
  std::int32_t row_blocks;   // blocks that share them
  std::int32_t tile_chunks;  // of the matrices, for one block
  std::int32_t tiles;        // of all operands
  Activation activation;
};

}  // namespace clusterfusion::cuda
