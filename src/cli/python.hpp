// The Python that holds the package `clusterfusion`.
#pragma once

#include <string>

namespace clusterfusion::cli {

// Names it: set by whoever starts the program as a part of a Python installation.
inline constexpr const char* kHubPython = "CLUSTERFUSION_HUB_PYTHON";

// The one that the environment names or, for the program of a wheel, the one that the wheel was
// installed for, which lies beside it. Empty if there is none.
std::string find_python();

}  // namespace clusterfusion::cli
