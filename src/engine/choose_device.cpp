#include "engine/choose_device.hpp"

#include "base/fail.hpp"

namespace clusterfusion {

DeviceChoice choose_device(const std::string& requested) {
  if (requested == "cpu") return {"cpu", "asked for"};
  if (requested == "auto") return {"cpu", "this build has no CUDA backend"};
  require(requested == "cuda", ErrorKind::invalid_argument,
          "device must be \"auto\", \"cpu\" or \"cuda\", got \"{}\"", requested);
  fail(ErrorKind::unsupported,
       "device \"cuda\": this build has no CUDA backend; use device \"cpu\" or \"auto\"");
}

}  // namespace clusterfusion
