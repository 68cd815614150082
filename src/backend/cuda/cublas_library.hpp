// cuBLASLt, loaded when a GPU is first used: it weighs half a gigabyte, and a machine without a GPU
// has no use for it. cublas_library.cpp defines those of its functions that the project calls.
#pragma once

#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace clusterfusion::cuda {

// What to give to dlopen, best first. `modules` are files (the Python extension, the program)
// beside whose folders pip puts NVIDIA's libraries; torch takes the same, and a process can have
// only one cuBLASLt, so these come before the system's.
std::vector<std::string> cublas_candidates(std::span<const std::filesystem::path> modules);

struct CublasLibrary {
  void* handle = nullptr;
  std::string obstacle;  // why there is no handle, and what to install
};

// The first candidate that can be loaded. A path where nothing is does not count as an obstacle.
CublasLibrary load_cublas(std::span<const std::string> candidates);

// Why cuBLASLt cannot be used, with what to install; empty if it is loaded. Never throws.
const std::string& cublas_unavailable_reason();

}  // namespace clusterfusion::cuda
