// Which device runs the model.
#pragma once

#include <string>

namespace clusterfusion {

struct DeviceChoice {
  std::string device;  // "cpu"
  std::string reason;  // why, for EngineInfo
};

// `requested`: "auto", "cpu" or "cuda".
// Errors: invalid_argument for another name, unsupported for a device that this build or machine
// does not have.
DeviceChoice choose_device(const std::string& requested);

}  // namespace clusterfusion
