// What the kernel that multiplies many rows by a layer's matrices is told.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "clusterfusion/model.hpp"
#include "plan/stream_plan.hpp"

namespace clusterfusion::cuda {

inline constexpr std::int32_t kMaxProductOperands = plan::kMaxResidualParts;

// A matrix, or one part of its columns, and the input vectors that it multiplies.
struct ProductOperand {
  plan::Stream stream;
  std::int32_t source;         // which of the maps
  std::int32_t layer;          // of the matrix
  std::int32_t first_column;   // of the part
  std::int32_t columns, rows;  // of the matrix
  const float* biases;         // [rows], or null: none, or another part adds them
  char* output;             // of the step's first row: float32, or 16-bit as product_input.hpp says
  std::int32_t output_row;  // elements from row to row of the output
  std::int32_t pieces, iterations, piece_steps;  // plan::ProductCut
  std::int32_t chunks;
  std::int32_t tiles;  // of so many chunks that a block computes
  bool ablated;        // zeros are its results
};

// Products that can be computed at the same time: of one or two matrices.
struct ProductParams {
  // 16-bit: [layers, rows, columns] of a matrix, in boxes of a tile's rows and a step's columns;
  // and its input vectors, as product_input.hpp says, in boxes of a block's rows and a step's
  // pieces.
  CUtensorMap weight_maps[2], input_maps[2];
  ProductOperand operands[kMaxProductOperands];
  std::int32_t count;        // of operands
  std::int32_t rows;         // of the step
  std::int32_t row_blocks;   // blocks that share them
  std::int32_t tile_chunks;  // of the matrices, for one block
  std::int32_t tiles;        // of all operands
  Activation activation;
};

}  // namespace clusterfusion::cuda
