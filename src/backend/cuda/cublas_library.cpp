#include "backend/cuda/cublas_library.hpp"

#include <cublasLt.h>
#include <dlfcn.h>

#include <cstdlib>

#include "base/fail.hpp"

#define CF_TEXT_OF(number) #number
#define CF_TEXT(number) CF_TEXT_OF(number)

namespace clusterfusion::cuda {
namespace {

namespace fs = std::filesystem;

// Functions and structures keep within a major version, which the name carries.
constexpr const char* kLibrary = "libcublasLt.so." CF_TEXT(CUBLAS_VER_MAJOR);

std::vector<fs::path> own_modules() {
  std::vector<fs::path> modules;
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&cublas_candidates), &info) != 0)
    modules.emplace_back(info.dli_fname);
  std::error_code no_proc;
  modules.push_back(fs::read_symlink("/proc/self/exe", no_proc));
  return modules;
}

const CublasLibrary& library() {
  static const CublasLibrary loaded = [] {
    // Whoever loaded one already (torch, for one) has decided for the whole process.
    if (void* handle = dlopen(kLibrary, RTLD_NOW | RTLD_NOLOAD)) return CublasLibrary{handle, {}};
    return load_cublas(cublas_candidates(own_modules()));
  }();
  return loaded;
}

void* find_function(const char* name) {
  require(library().handle != nullptr, ErrorKind::unsupported, "{}", library().obstacle);
  void* function = dlsym(library().handle, name);
  require(function != nullptr, ErrorKind::unsupported,
          "{} has no function {}; install a newer one of the same major version", kLibrary, name);
  return function;
}

}  // namespace

std::vector<std::string> cublas_candidates(std::span<const fs::path> modules) {
  std::vector<std::string> candidates;
  for (const fs::path& module : modules) {
    const fs::path packages = module.parent_path().parent_path() / "nvidia";
    for (const char* folder : {"cu" CF_TEXT(CUBLAS_VER_MAJOR), "cublas"})
      candidates.push_back(packages / folder / "lib" / kLibrary);
  }
  candidates.emplace_back(kLibrary);  // LD_LIBRARY_PATH and the system's folders
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* folder = std::getenv(variable))
      candidates.push_back(fs::path(folder) / "lib64" / kLibrary);
  }
  for (const char* folder : {"/usr/local/cuda", "/usr/local/cuda-" CF_TEXT(CUBLAS_VER_MAJOR)})
    candidates.push_back(fs::path(folder) / "lib64" / kLibrary);
  return candidates;
}

CublasLibrary load_cublas(std::span<const std::string> candidates) {
  std::string errors;
  for (const std::string& candidate : candidates) {
    std::error_code unreadable;
    if (candidate != kLibrary && !fs::exists(candidate, unreadable)) continue;
    if (void* handle = dlopen(candidate.c_str(), RTLD_NOW)) return {handle, {}};
    errors += fmt::format("{}{}", errors.empty() ? "" : "; ", dlerror());
  }
  return {nullptr,
          fmt::format("cuBLASLt of CUDA {} cannot be loaded ({}); install it with "
                      "`python -m pip install 'nvidia-cublas=={}.*'` beside clusterfusion, "
                      "or install the CUDA toolkit",
                      CUBLAS_VER_MAJOR, errors, CUBLAS_VER_MAJOR)};
}

const std::string& cublas_unavailable_reason() { return library().obstacle; }

}  // namespace clusterfusion::cuda

// cublasLt.h's functions, passed on to the library. They are hidden, so that they do not take the
// place of the real ones for anybody else in the process.
#define CF_FORWARD(result, name, parameters, arguments)                               \
  extern "C" __attribute__((visibility("hidden"))) result name parameters {           \
    static const auto function =                                                      \
        reinterpret_cast<decltype(&name)>(clusterfusion::cuda::find_function(#name)); \
    return function arguments;                                                        \
  }

CF_FORWARD(const char*, cublasLtGetStatusName, (cublasStatus_t status), (status))
CF_FORWARD(const char*, cublasLtGetStatusString, (cublasStatus_t status), (status))
CF_FORWARD(std::size_t, cublasLtGetVersion, (), ())
CF_FORWARD(cublasStatus_t, cublasLtCreate, (cublasLtHandle_t * handle), (handle))
CF_FORWARD(cublasStatus_t, cublasLtDestroy, (cublasLtHandle_t handle), (handle))
CF_FORWARD(cublasStatus_t, cublasLtMatrixLayoutCreate,
           (cublasLtMatrixLayout_t * layout, cudaDataType type, std::uint64_t rows,
            std::uint64_t columns, std::int64_t stride),
           (layout, type, rows, columns, stride))
CF_FORWARD(cublasStatus_t, cublasLtMatrixLayoutDestroy, (cublasLtMatrixLayout_t layout), (layout))
CF_FORWARD(cublasStatus_t, cublasLtMatmulDescCreate,
           (cublasLtMatmulDesc_t * description, cublasComputeType_t compute, cudaDataType_t scale),
           (description, compute, scale))
CF_FORWARD(cublasStatus_t, cublasLtMatmulDescDestroy, (cublasLtMatmulDesc_t description),
           (description))
CF_FORWARD(cublasStatus_t, cublasLtMatmulDescSetAttribute,
           (cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t attribute,
            const void* value, std::size_t bytes),
           (description, attribute, value, bytes))
CF_FORWARD(cublasStatus_t, cublasLtMatmulPreferenceCreate,
           (cublasLtMatmulPreference_t * preference), (preference))
CF_FORWARD(cublasStatus_t, cublasLtMatmulPreferenceDestroy, (cublasLtMatmulPreference_t preference),
           (preference))
CF_FORWARD(cublasStatus_t, cublasLtMatmulPreferenceSetAttribute,
           (cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
            const void* value, std::size_t bytes),
           (preference, attribute, value, bytes))
CF_FORWARD(cublasStatus_t, cublasLtMatmulAlgoGetHeuristic,
           (cublasLtHandle_t handle, cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a,
            cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
            cublasLtMatmulPreference_t preference, int requested,
            cublasLtMatmulHeuristicResult_t* results, int* found),
           (handle, description, a, b, c, d, preference, requested, results, found))
CF_FORWARD(cublasStatus_t, cublasLtMatmul,
           (cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void* alpha,
            const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
            cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
            cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
            const cublasLtMatmulAlgo_t* algorithm, void* workspace, std::size_t workspace_bytes,
            cudaStream_t stream),
           (handle, description, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout,
            algorithm, workspace, workspace_bytes, stream))
