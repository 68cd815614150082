// Which device runs the model.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.hpp"

namespace clusterfusion {

struct DeviceChoice {
  std::string device;  // "cpu" or "cuda"
  std::string reason;  // why, for EngineInfo
};

// `requested`: "auto", "cpu" or "cuda". "auto" takes the GPU if this build has the CUDA backend and
// this machine a GPU that it supports, else the CPU.
// Errors: invalid_argument for another name, unsupported for a device that this build or machine
// does not have.
DeviceChoice choose_device(const std::string& requested);

// The backend for `choice`. If "auto" had chosen a GPU that cannot run this model (its shape, its
// dtype, its size), the CPU takes it, and choice.reason says why.
// Errors: those of the backends.
std::unique_ptr<Backend> make_backend(const std::string& requested, DeviceChoice& choice,
                                      const std::shared_ptr<const Model>& model,
                                      const BackendOptions& options);

}  // namespace clusterfusion
