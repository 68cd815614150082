#include "backend/cuda/cublas_library.hpp"

#include <cublasLt.h>
#include <gmock/gmock.h>

#include <fstream>

namespace clusterfusion::cuda {
namespace {

namespace fs = std::filesystem;
using testing::Contains;
using testing::HasSubstr;

// cuBLASLt's name as the linker has it.
const std::string kName = "libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR);

TEST(CublasLibrary, ComesFromBesideThePackageBeforeTheSystem) {
  const fs::path module = "/venv/lib/python3/site-packages/clusterfusion/libclusterfusion_ffi.so";
  const std::vector<std::string> found = cublas_candidates(std::vector{module});
  // nvidia-cublas and torch for CUDA 13; older packages of NVIDIA.
  EXPECT_EQ(found[0], "/venv/lib/python3/site-packages/nvidia/cu13/lib/" + kName);
  EXPECT_EQ(found[1], "/venv/lib/python3/site-packages/nvidia/cublas/lib/" + kName);
  EXPECT_EQ(found[2], kName);
  EXPECT_THAT(found, Contains("/usr/local/cuda/lib64/" + kName));
}

TEST(CublasLibrary, SaysWhatToInstall) {
  const fs::path broken = fs::path(testing::TempDir()) / kName;
  std::ofstream(broken) << "not a library";
  const CublasLibrary library =
      load_cublas(std::vector<std::string>{"/nowhere/" + kName, broken.string()});
  fs::remove(broken);
  EXPECT_EQ(library.handle, nullptr);
  EXPECT_THAT(library.obstacle, HasSubstr("cannot be loaded (" + broken.string()));
  EXPECT_THAT(library.obstacle, HasSubstr("pip install 'nvidia-cublas==13.*'"));
  EXPECT_THAT(library.obstacle, HasSubstr("CUDA toolkit"));
}

// No GPU is needed to describe a matrix.
TEST(CublasLibrary, IsCalledThroughItsHeader) {
  if (!cublas_unavailable_reason().empty()) GTEST_SKIP() << cublas_unavailable_reason();
  EXPECT_STREQ(cublasLtGetStatusName(CUBLAS_STATUS_NOT_SUPPORTED), "CUBLAS_STATUS_NOT_SUPPORTED");
  cublasLtMatrixLayout_t layout = nullptr;
  ASSERT_EQ(cublasLtMatrixLayoutCreate(&layout, CUDA_R_16F, 2, 3, 2), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cublasLtMatrixLayoutDestroy(layout), CUBLAS_STATUS_SUCCESS);
}

}  // namespace
}  // namespace clusterfusion::cuda
