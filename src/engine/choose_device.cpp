#include "engine/choose_device.hpp"

#ifdef CLUSTERFUSION_WITH_CUDA
#include "backend/cuda/cuda_backend.hpp"
#endif
#include "base/fail.hpp"

namespace clusterfusion {

#ifndef CLUSTERFUSION_WITH_CUDA
namespace {

std::string cuda_unavailable_reason() { return "this build has no CUDA backend"; }

std::unique_ptr<Backend> make_cuda_backend(const std::shared_ptr<const Model>&,
                                           const BackendOptions&) {
  fail(ErrorKind::internal, "{}", cuda_unavailable_reason());
}

}  // namespace
#endif

DeviceChoice choose_device(const std::string& requested) {
  if (requested == "cpu") return {"cpu", "asked for"};
  require(requested == "auto" || requested == "cuda", ErrorKind::invalid_argument,
          "device must be \"auto\", \"cpu\" or \"cuda\", got \"{}\"", requested);
  const std::string obstacle = cuda_unavailable_reason();
  if (requested == "auto") {
    return obstacle.empty() ? DeviceChoice{"cuda", "a supported GPU is there"}
                            : DeviceChoice{"cpu", obstacle};
  }
  require(obstacle.empty(), ErrorKind::unsupported,
          "device \"cuda\": {}; use device \"cpu\" or \"auto\"", obstacle);
  return {"cuda", "asked for"};
}

std::unique_ptr<Backend> make_backend(const std::string& requested, DeviceChoice& choice,
                                      const std::shared_ptr<const Model>& model,
                                      const BackendOptions& options) {
  if (choice.device == "cuda") {
    try {
      return make_cuda_backend(model, options);
    } catch (const Error& error) {
      const bool gpu_cannot =
          error.kind() == ErrorKind::unsupported || error.kind() == ErrorKind::out_of_memory;
      if (requested != "auto" || !gpu_cannot) throw;
      choice = {"cpu", error.what()};
    }
  }
  std::unique_ptr<Backend> backend = make_cpu_backend(model, options);
  // Weights are used where they are: nothing is left to load.
  if (options.load_progress) options.load_progress(model->total_bytes(), model->total_bytes());
  return backend;
}

}  // namespace clusterfusion
