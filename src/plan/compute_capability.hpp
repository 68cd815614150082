// Which GPUs a build's machine code runs on.
#pragma once

#include <string>
#include <string_view>

namespace clusterfusion::plan {

struct ComputeCapability {
  int major = 0, minor = 0;
};

// Whether machine code for one of `architectures` runs on such a device. They are CMake's
// CMAKE_CUDA_ARCHITECTURES, with `;` or `,` between: "80-real" runs on 8.0 and later ones with an 8
// in front, "90a-real" on 9.0 alone. What the driver would compile anew ("-virtual") counts for
// nothing: such code takes the ways of the chip it was made for.
bool runs_on(std::string_view architectures, ComputeCapability device);

// What such a device needs, as CMAKE_CUDA_ARCHITECTURES has it: "80-real" for 8.6. Empty where the
// kernels cannot be compiled for it (before 8.0).
std::string architecture_for(ComputeCapability device);

// Why a build for `architectures` does not run on such a device, and what to do, for error
// messages: "has compute capability 8.6; this build has code for 9.0; ...". Empty if it does.
std::string no_code_because(std::string_view architectures, ComputeCapability device);

}  // namespace clusterfusion::plan
