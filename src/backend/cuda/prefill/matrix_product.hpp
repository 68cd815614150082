// Products of activations with weights, many rows at once.
//
// Each result is one chain of tensor-core sums over its row and its column of weights, in their
// order, so that a row has the same bits whatever rows stand beside it and however many.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

// What becomes of a result, x weight^T + bias.
enum class ProductEpilogue {
  store,       // y = result; y is float32
  add,         // y += result; y is float32
  activate,    // y = activation(result); y is 16-bit
  times_gate,  // y = activation(gate) * result; y is 16-bit
};

struct Product {
  const void* x = nullptr;       // [rows, in], 16-bit
  const void* weight = nullptr;  // [out, in], 16-bit, as torch.nn.Linear stores it
  const float* bias = nullptr;   // [out], or null
  const float* gate = nullptr;   // [rows, out], of times_gate
  void* y = nullptr;             // [rows, out]
  std::int64_t rows = 0, in = 0, out = 0;
  ProductEpilogue epilogue = ProductEpilogue::store;
};

// Which instructions multiply. Both give the same bits.
enum class ProductUnit {
  warpgroup,  // wgmma: sm_90a
  warp,       // mma.sync: anywhere
};

// All pointers are multiples of 16 bytes, `in` is a multiple of 8 and `out` of 4; to store without
// a bias, `out` may be any number.
class MatrixProducts {
 public:
  // For the current device: with the unit that it has, or with the one that is named. `dtype` is
  // that of activations and weights. Errors: unsupported if the unit is missing.
  MatrixProducts(DType dtype, Activation activation);
  MatrixProducts(DType dtype, Activation activation, ProductUnit unit);

  // Errors: those of a launch.
  void multiply(const Product& product, cudaStream_t stream) const;

 private:
  DType dtype_;
  Activation activation_;
  ProductUnit unit_;
  bool by_maps_ = false;  // copies by tensor maps
  std::int64_t multiprocessors_ = 0;
  std::int64_t shared_bytes_ = 0;  // that a block may have
};

}  // namespace clusterfusion::cuda
