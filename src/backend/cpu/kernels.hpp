// The arithmetic of the CPU backend, compiled for several instruction sets and chosen at run time.
//
// All results are the same for any number of threads, rows or tokens computed together: each output
// element is computed in one fixed order of its own. Sums over k run in 16 lanes, lane i over
// k = i, i + 16, ..., and end in one fixed tree (i with i + 8, + 4, + 2, + 1), whatever the width
// of the machine's vectors; so instruction sets with fused multiply-add agree with each other too.
#pragma once

#include <cstddef>
#include <cstdint>

#include "clusterfusion/model.hpp"

namespace clusterfusion::cpu {

// Lanes of every sum. Rows of activations are padded with zeros to a multiple of this.
inline constexpr std::int64_t kLanes = 16;
inline constexpr std::int64_t padded(std::int64_t count) noexcept {
  return (count + kLanes - 1) / kLanes * kLanes;
}

// Queries that attention computes together; blocks of queries start at multiples of it.
inline constexpr std::int64_t kQueryBlock = 4;
// Weight rows in a task are best a multiple of this: it divides into 1 to 4 streams of rows.
inline constexpr std::int64_t kRowGroup = 12;

// Row-major weights [rows, cols].
struct Matrix {
  const std::byte* data = nullptr;
  DType dtype = DType::float32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
};

// What multiply() computes: for t in [0, tokens), r in [row_begin, row_end)
//   out[t * out_stride + r] (+)= sum_k weights[r, k] * in[t * in_stride + k] + bias[r]
struct Product {
  Matrix weights;
  const float* in = nullptr;   // [tokens, in_stride], zeros from weights.cols to the padded width
  std::int64_t in_stride = 0;  // >= padded(weights.cols)
  std::int64_t tokens = 0;
  float* out = nullptr;
  std::int64_t out_stride = 0;
  const float* bias = nullptr;  // [rows] or null
  bool add_to_out = false;
};

// One head's keys and values in a page of kKvPagePositions positions: keys transposed, so that
// scores of 16 positions are one vector, then values.
//   keys   [head_dim][kKvPagePositions]
//   values [kKvPagePositions][padded(head_dim)], the padding zero
struct KvLayout {
  DType dtype = DType::float32;
  std::int64_t head_dim = 0;
  std::int64_t padded_dim = 0;

  std::int64_t key_elements() const noexcept;
  std::int64_t elements() const noexcept;  // keys and values
};

// Causal attention of one head for consecutive positions of one sequence.
struct AttentionTask {
  KvLayout layout;
  const std::byte* const* pages = nullptr;  // of the sequence, from position 0
  std::int64_t page_offset = 0;             // bytes from a page's start to this layer and head
  std::int64_t first_position = 0;          // of the first query
  std::int64_t queries = 0;
  const float* query = nullptr;  // [queries, query_stride], head_dim values each
  std::int64_t query_stride = 0;
  float* out = nullptr;  // [queries, out_stride], head_dim values each
  std::int64_t out_stride = 0;
  float scale = 1.0f;  // of the scores
};

// Highway's name of the instruction set that the kernels use on this machine.
const char* target_name();

void multiply(const Product& product, std::int64_t row_begin, std::int64_t row_end);

// Applies `activation` to values[0, count).
void activate(Activation activation, float* values, std::int64_t count);

// out = (x - mean) / sqrt(variance + eps) * weight + bias over `count` values, mean and variance in
// two passes. out's padding up to padded(count) becomes zero.
void layer_norm(const float* x, const float* weight, const float* bias, float eps,
                std::int64_t count, float* out);

// out = x / sqrt(mean of x^2 + eps) * weight, likewise.
void rms_norm(const float* x, const float* weight, float eps, std::int64_t count, float* out);

// Widens `count` values of `dtype` to float32.
void widen(DType dtype, const std::byte* from, std::int64_t count, float* to);

// Floats that attend() needs as scratch.
std::int64_t attention_scratch(std::int64_t head_dim) noexcept;
void attend(const AttentionTask& task, float* scratch);

bool all_finite(const float* values, std::int64_t count);

// Reads memory with plain vector loads, and returns a checksum so that nothing is left out.
std::uint64_t read_memory(const std::byte* data, std::int64_t bytes);

}  // namespace clusterfusion::cpu
