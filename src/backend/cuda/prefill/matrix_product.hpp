// Products of activations with weights by cuBLASLt.
#pragma once

#include <cublasLt.h>

#include <compare>
#include <cstdint>
#include <map>
#include <memory>

#include "backend/cuda/memory.hpp"
#include "clusterfusion/model.hpp"

namespace clusterfusion::cuda {

// Throws internal (out_of_memory where cuBLAS says so); `doing` says what was attempted.
void check(cublasStatus_t status, const char* doing);

struct Product {
  const void* x = nullptr;       // [rows, in], 16-bit
  const void* weight = nullptr;  // [out, in], 16-bit, as torch.nn.Linear stores it
  const float* bias = nullptr;   // [out], or null
  float* y = nullptr;            // [rows, out]
  std::int64_t rows = 0, in = 0, out = 0;
  bool accumulate = false;  // y += instead of y =
};

// All pointers are multiples of 16 bytes, `in` is a multiple of 8. Sums are float32; the same
// product on the same chip gives the same bits.
class MatrixProducts {
 public:
  // `dtype` is that of activations and weights. Errors: out_of_memory, internal.
  explicit MatrixProducts(DType dtype);

  // y = x weight^T + bias (+ y), on `stream`. The algorithm is asked for once for each shape.
  // Errors: internal, with the shape, if cuBLASLt has no algorithm for it.
  void multiply(const Product& product, cudaStream_t stream);

 private:
  struct Key {
    std::int64_t rows, in, out;
    bool has_bias, accumulate;
    auto operator<=>(const Key&) const = default;
  };
  struct Destroy {
    void operator()(cublasLtHandle_t handle) const { cublasLtDestroy(handle); }
    void operator()(cublasLtMatmulDesc_t description) const {
      cublasLtMatmulDescDestroy(description);
    }
    void operator()(cublasLtMatrixLayout_t layout) const { cublasLtMatrixLayoutDestroy(layout); }
    void operator()(cublasLtMatmulPreference_t preference) const {
      cublasLtMatmulPreferenceDestroy(preference);
    }
  };
  template <typename Handle>
  using Owner = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;
  using Layout = Owner<cublasLtMatrixLayout_t>;

  // What is fixed for a shape.
  struct Plan {
    Owner<cublasLtMatmulDesc_t> description;
    Layout weight, x, y;
    cublasLtMatmulAlgo_t algorithm;
  };

  Plan& plan_for(const Product& product);
  Plan make_plan(const Key& key, const float* bias) const;
  void choose_algorithm(const Key& key, Plan& plan) const;

  cudaDataType_t type_;
  Owner<cublasLtHandle_t> handle_;
  Owner<cublasLtMatmulPreference_t> preference_;
  DeviceMemory workspace_;
  std::map<Key, Plan> plans_;
};

}  // namespace clusterfusion::cuda
