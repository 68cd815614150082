#include "backend/cuda/prefill/matrix_product.hpp"

#include "base/fail.hpp"
#ifdef CLUSTERFUSION_RACECHECK
#include "backend/cuda/prefill/plain_product.hpp"
#endif

namespace clusterfusion::cuda {
namespace {

// For sums that are split.
constexpr std::int64_t kSplitBytes = 8 << 20;
// Split-K through the workspace is summed in a fixed order; in place it is not.
constexpr std::uint32_t kReductions =
    CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE;

template <typename T>
void set(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t attribute,
         const T& value) {
  check(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof(value)),
        "describing a matrix product");
}

template <typename T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
         const T& value) {
  check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)),
        "describing a matrix product");
}

void set_bias(cublasLtMatmulDesc_t description, const float* bias) {
  set(description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
}

cublasLtMatrixLayout_t make_layout(cudaDataType_t type, std::int64_t rows, std::int64_t columns) {
  cublasLtMatrixLayout_t layout = nullptr;
  // Column-major as cuBLAS has it: our [columns, rows], row-major.
  check(cublasLtMatrixLayoutCreate(&layout, type, static_cast<std::uint64_t>(rows),
                                   static_cast<std::uint64_t>(columns), rows),
        "describing a matrix");
  return layout;
}

}  // namespace

void check(cublasStatus_t status, const char* doing) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const ErrorKind kind =
      status == CUBLAS_STATUS_ALLOC_FAILED ? ErrorKind::out_of_memory : ErrorKind::internal;
  fail(kind, "cuBLAS failed while {}: {} ({})", doing, cublasLtGetStatusString(status),
       cublasLtGetStatusName(status));
}

MatrixProducts::MatrixProducts(DType dtype)
    : type_(dtype == DType::float16 ? CUDA_R_16F : CUDA_R_16BF),
      workspace_(kSplitBytes, "the workspace of matrix products") {
  cublasLtHandle_t handle = nullptr;
  check(cublasLtCreate(&handle), "starting cuBLASLt");
  handle_.reset(handle);
  cublasLtMatmulPreference_t preference = nullptr;
  check(cublasLtMatmulPreferenceCreate(&preference), "describing a matrix product");
  preference_.reset(preference);
  set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
      static_cast<std::uint64_t>(kSplitBytes));
  set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, kReductions);
  for (const auto alignment :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    set(preference, alignment, std::uint32_t{16});
}

void MatrixProducts::multiply(const Product& product, cudaStream_t stream) {
#ifdef CLUSTERFUSION_RACECHECK
  multiply_plainly(type_ == CUDA_R_16F ? DType::float16 : DType::bfloat16, product, stream);
#else
  const Plan& plan = plan_for(product);
  const float one = 1.0f;
  const float kept = product.accumulate ? 1.0f : 0.0f;
  check(cublasLtMatmul(handle_.get(), plan.description.get(), &one, product.weight,
                       plan.weight.get(), product.x, plan.x.get(), &kept, product.y, plan.y.get(),
                       product.y, plan.y.get(), &plan.algorithm, workspace_.as<>(),
                       static_cast<std::size_t>(workspace_.bytes()), stream),
        "multiplying matrices");
#endif
}

MatrixProducts::Plan& MatrixProducts::plan_for(const Product& product) {
  const Key key{product.rows, product.in, product.out, product.bias != nullptr, product.accumulate};
  const auto found = plans_.find(key);
  if (found == plans_.end()) return plans_.emplace(key, make_plan(key, product.bias)).first->second;
  if (key.has_bias) set_bias(found->second.description.get(), product.bias);
  return found->second;
}

MatrixProducts::Plan MatrixProducts::make_plan(const Key& key, const float* bias) const {
  Plan plan;
  cublasLtMatmulDesc_t description = nullptr;
  check(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F),
        "describing a matrix product");
  plan.description.reset(description);
  // Row-major y = x weight^T is column-major y' = weight'^T x'.
  set(description, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (key.has_bias) {
    set(description, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set_bias(description, bias);
  }
  plan.weight.reset(make_layout(type_, key.in, key.out));
  plan.x.reset(make_layout(type_, key.in, key.rows));
  plan.y.reset(make_layout(CUDA_R_32F, key.out, key.rows));
  choose_algorithm(key, plan);
  return plan;
}

void MatrixProducts::choose_algorithm(const Key& key, Plan& plan) const {
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_.get(), plan.description.get(), plan.weight.get(), plan.x.get(), plan.y.get(),
      plan.y.get(), preference_.get(), 1, &result, &found);
  require(status == CUBLAS_STATUS_SUCCESS && found == 1, ErrorKind::internal,
          "cuBLASLt has no algorithm for [{}, {}] x [{}, {}]{}{}: {}", key.rows, key.in, key.in,
          key.out, key.has_bias ? " with bias" : "", key.accumulate ? ", added up" : "",
          cublasLtGetStatusName(status));
  plan.algorithm = result.algo;
}

}  // namespace clusterfusion::cuda
